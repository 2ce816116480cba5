"""What makes two runs the same run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dotresize_fx.calibration import CalibrationData
from dotresize_fx.journal import Journal, export_of
from dotresize_fx.offload.lazy_tensor import LazyTensor
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


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(share * len(data))]


def flip(share: float) -> Callable[[bytes], bytes]:
    def flipped(data: bytes) -> bytes:
        place = int(share * len(data))
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    return flipped


@pytest.mark.parametrize("ending", ["safetensors", "json"])
@pytest.mark.parametrize("damage", [cut(0), cut(0.1), cut(0.99), flip(0.2), flip(0.5), flip(0.97)])
def test_a_sublayer_that_was_damaged_is_not_finished(
    tmp_path: Path, damage: Callable[[bytes], bytes], ending: str
) -> None:
    """Cut off or changed on the disk; its files go, others stay."""
    journal = Journal(tmp_path / "journal", {})
    for number in range(2):
        journal.write_sublayer(number, [], {}, {"weight": torch.ones(8)})
    file = tmp_path / "journal" / f"00000.{ending}"
    file.write_bytes(damage(file.read_bytes()))
    assert journal.sublayer(0, []) is None
    assert (journal.finished, journal.damaged) == (1, 1)
    assert journal.sublayer(0, []) is None
    assert journal.damaged == 1  # it is gone
    assert not list(file.parent.glob("00000.*"))
    other = journal.sublayer(1, [])
    assert other is not None
    assert torch.equal(other.parameters["weight"].read(), torch.ones(8))


def test_what_another_export_left_is_told_and_goes_once_there_is_more(tmp_path: Path) -> None:
    first = Journal(tmp_path / "journal", told())
    first.write_sublayer(0, [], {}, {"weight": torch.ones(8)})
    again = Journal(tmp_path / "journal", told())
    assert (again.finished, again.other) == (1, "")
    other = Journal(tmp_path / "journal", told(tokens=1, repair_steps=3))
    assert other.other == "1 finished sublayer of an earlier run (another export: --repair-steps, calibration text)"
    assert (other.finished, other.plan(), other.sublayer(0, [])) == (0, None, None)
    assert Journal(tmp_path / "journal", told()).finished == 1  # nothing was written: nothing went
    other.write_plan(WidthPlan({}), [])
    assert Journal(tmp_path / "journal", told()).finished == 0


@pytest.mark.parametrize("damage", [cut(0.5), flip(0.2), flip(0.8)])
def test_whose_it_was_is_damaged(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    Journal(tmp_path / "journal", told()).write_sublayer(0, [], {}, {"weight": torch.ones(8)})
    file = tmp_path / "journal" / "export.json"
    file.write_bytes(damage(file.read_bytes()))
    journal = Journal(tmp_path / "journal", told())
    assert journal.other == "1 finished sublayer of an earlier run (which export it was is damaged)"
    assert journal.finished == 0


@pytest.mark.parametrize("damage", [cut(0), cut(0.5), flip(0.3), flip(0.5), flip(0.9)])
def test_a_plan_that_was_damaged_is_none(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    journal = Journal(tmp_path / "journal", {})
    assert journal.plan() is None
    journal.write_plan(WidthPlan({"one": 48, "other": 96}, {"one": 0.25}), ["a note"])
    assert journal.plan() == (WidthPlan({"one": 48, "other": 96}, {"one": 0.25}), ("a note",))
    file = tmp_path / "journal" / "plan.json"
    file.write_bytes(damage(file.read_bytes()))
    assert journal.plan() is None


def test_nothing_half_written_stays_of_a_sublayer(tmp_path: Path) -> None:
    """A signal comes, or the disk is full, while its numbers are written."""
    journal = Journal(tmp_path / "journal", {})
    journal.write_sublayer(0, [], {}, {"weight": torch.ones(8)})
    before = sorted(journal.folder.iterdir())

    def end() -> torch.Tensor:
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        journal.write_sublayer(1, [], {}, {"a": torch.ones(8), "b": LazyTensor(end, (8,), torch.float32)})
    assert sorted(journal.folder.iterdir()) == before
