"""What makes two runs the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dotresize_fx.calibration import CalibrationData
from dotresize_fx.journal import Journal, export_of
from dotresize_fx.options import Options
from dotresize_fx.width_plan import WidthPlan


def told(plan: dict[str, int] | None = None, half: bool = False, tokens: int = 0, **options: Any) -> dict[str, Any]:
    ids = torch.full((1, 4), tokens)
    data = CalibrationData([{"input_ids": ids}], [], "a text", {})
    found = None if plan is None else WidthPlan(plan)
    return export_of(Options(**options), {"config.json": "0"}, data, found, "cpu", half=half)


@pytest.mark.parametrize(
    "other", [{"plan": {"ffn": 30}}, {"half": True}, {"tokens": 1}, {"ratio": 0.3}, {"seed": 1}, {"effort": "best"}]
)
def test_what_decides_on_numbers_is_another_export(other: dict[str, Any]) -> None:
    """A plan by what it says, not by the name of its file."""
    assert told(plan={"ffn": 41}) == told(plan={"ffn": 41})
    assert told(**{"plan": {"ffn": 41}, **other}) != told(plan={"ffn": 41})


@pytest.mark.parametrize("other", [{"memory_budget": "4GiB"}, {"quantize": "int8"}, {"formats": ("pt2",)}])
def test_room_and_what_is_written_beside_the_model_are_not(other: dict[str, Any]) -> None:
    assert told(**other) == told()


@pytest.mark.parametrize("left", [0, 4, 60, -1])
def test_a_sublayer_that_was_cut_off_is_not_finished(tmp_path: Path, left: int) -> None:
    """Its file goes, others stay."""
    journal = Journal(tmp_path / "journal", {})
    for number in range(2):
        journal.write_sublayer(number, [], {}, {"weight": torch.ones(8)})
    file = tmp_path / "journal" / "00000.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    assert journal.sublayer(0, []) is None
    assert not file.exists()
    other = journal.sublayer(1, [])
    assert other is not None
    assert torch.equal(other.parameters["weight"].read(), torch.ones(8))
