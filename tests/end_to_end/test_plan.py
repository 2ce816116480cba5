"""What decides the widths, as seen from outside: a share of MACs, heads of one size, and a plan used again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def report_of(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return content


def test_a_share_of_macs_with_heads_of_one_size_and_its_plan_again(
    tmp_path: Path, save_tiny_model: Callable[..., Path], few_tokens: list[str], here: Callable[..., Any]
) -> None:
    """Heads of 16 can become 8."""
    model, out, again = save_tiny_model(tmp_path / "model", **SIZES, head_dim=16), tmp_path / "out", tmp_path / "again"
    regions = ["--regions", "value,query_key,ffn"]
    command = ["export", model, out, "--ratio", 0.4, "--cost", "macs", "--head-sizes", "equal", *regions, *few_tokens]
    first = here(*command, "--quiet")
    assert (first.code, first.stderr) == (0, "")  # the plan is no news to those who want none
    report = report_of(out)
    assert (report["options"]["cost"], report["options"]["head_sizes"]) == ("macs", "equal")
    (told,) = [note for note in report["notes"] if note.startswith("the ratio is of the blocks' MACs per token")]
    assert "attention over 32 tokens" in told
    # Of 40,960 MACs; the largest step, 8 of queries, keys and values, is 8,192 of them.
    assert 40 <= float(told.split(": ")[1].partition("%")[0]) <= 60
    assert "Note: the ratio is of the" in first.stdout
    widths = {row["kind"]: row["width_after"] for row in report["regions"]}
    assert widths["value"] == widths["query_key"] == 8
    assert report["summary"]["verified"] is True

    second = here("export", model, again, "--plan", out / "plan.json", *few_tokens)
    assert second.code == 0
    assert "  model.layers.0  128" in second.stderr
    assert "16 -> 8     16 -> 8" in second.stderr
    followed = report_of(again)
    assert not {"ratio", "cost", "allocation", "head_sizes", "regions"} & followed["options"].keys()
    assert {row["kind"]: row["width_after"] for row in followed["regions"]} == widths
    assert (again / "model.onnx.data").read_bytes() == (out / "model.onnx.data").read_bytes()
