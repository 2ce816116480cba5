"""The residual stream cut in one basis a sublayer, to a verified ONNX: a tied decoder and a post-norm encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dotresize_fx
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.onnx_file import WEIGHTS_FILE


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_basis_a_sublayer(
    tmp_path: Path,
    save_tiny_model: Callable[..., Path],
    text_file: Path,
    few_tokens: list[str],
    here: Callable[..., Any],
    kind: str,
) -> None:
    """And for the decoder its plan again, whose weights have the same bytes."""
    model, out = save_tiny_model(tmp_path / "model", kind), tmp_path / "out"
    command = ["export", model, out, "--ratio", 0.1, "--regions", "residual", "--multiple", 2, *few_tokens]
    if kind == "bert":
        refused = here(*command)
        assert refused.code == 6
        assert "use --basis sublayer or --regions ffn" in refused.stderr
    done = here(*command, "--basis", "sublayer", "--check")
    assert done.code == 0, done.stderr
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["summary"]["verified"] is True
    assert any(note.startswith("3 bases, one a sublayer, and ") for note in report["notes"])
    (row,) = (row for row in report["regions"] if row["kind"] == "residual")
    assert (row["width_before"], row["method"]) == (32, "pca")
    assert row["width_after"] < 32
    if kind == "llama":
        sizes = {"calibration_tokens": 2048, "sequence_length": 32, "evaluation_tokens": 512}
        again = dotresize_fx.slim(model, plan=out / "plan.json", basis="sublayer", calibration=text_file, **sizes)
        emit_onnx(again.loaded.model, again.captured, again.slim, tmp_path)
        assert (tmp_path / WEIGHTS_FILE).read_bytes() == (out / WEIGHTS_FILE).read_bytes()
