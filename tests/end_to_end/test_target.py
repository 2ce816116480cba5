"""An export for one of ONNX Runtime's providers, on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_a_fused_graph_is_verified_and_said_to_be_one(
    here: Callable[..., Any], model_folder: Callable[[str], Path], few_tokens: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = here("export", model_folder("llama"), out, "--ratio", 0.2, "--target", "cpu", *few_tokens)
    assert ended.code == 0, ended.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["options"]["target"] == "cpu"
    verification = report["figures"]["verification"]
    assert verification["max_abs_difference"] <= verification["tolerance"]
    assert [note for note in report["notes"] if "SkipSimplifiedLayerNormalization" in note]
    text = here("generate", out, "the of and", "--max-tokens", 4, "--quiet")
    assert text.code == 0, text.stderr
