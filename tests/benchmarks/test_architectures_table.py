"""The page of architectures: what is counted, and what counts as wrong."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

GOOD = {"key": "causal:a", "regions": {"ffn": 2, "residual": 1}, "ffn_layers": 2, "ffn_found": 2, "ffn_missing": []}
GOOD |= {"proof": {"ffn": 1e-7, "residual": 1e-6}, "wrong": {"ffn": 0.5, "residual": 0.5}, "unproved": {}, "onnx": 1e-6}
GOOD |= {"unmatched": [], "refused": []}


@pytest.fixture(scope="module")
def table(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("architectures_table")


def counted(table: ModuleType, *rows: dict[str, Any]) -> dict[str, str]:
    return {what.split(" (")[0].split(",")[0]: count for what, count in table.summary(rows)}


def test_a_good_row(table: ModuleType) -> None:
    found = counted(table, GOOD)
    assert found["a wrong result without an error"] == "0"
    assert found["residual stream proved"] == found["FFN or experts proved"] == "1"
    assert table.cells(GOOD)[:3] == ["a", "causal", "2/2"]


@pytest.mark.parametrize(
    "change", [{"proof": {"ffn": 1e-2}}, {"proof": {"ffn": None}}, {"onnx": 0.5}, {"onnx": None}], ids=str
)
def test_what_is_wrong(table: ModuleType, change: dict[str, Any]) -> None:
    assert counted(table, GOOD | change)["a wrong result without an error"] == "1"


def test_what_wrong_maps_leave_alone_is_not_proved(table: ModuleType) -> None:
    row = GOOD | {"wrong": {"ffn": 0.5, "residual": 1e-9}}
    assert counted(table, row)["residual stream proved"] == "0"
    assert "wrong maps of residual change nothing" in table.cells(row)[-1]


def test_what_was_not_captured_says_why(table: ModuleType) -> None:
    row = {"key": "image:b", "failed": "capture", "error": "it said\x1b[96m | no\x1b[0m"}
    assert table.cells(row)[-1] == "not examined further (capture): it said / no"
    assert counted(table, row, GOOD)["examined"] == "2"


def test_attention_without_a_width_says_why(table: ModuleType) -> None:
    row = GOOD | {"unmatched": [["input: it is reshaped; output: of its output: several ops read it", 2]]}
    assert "attention: of its output: several ops read it" in table.cells(row)[-1]
    matched = row | {"regions": GOOD["regions"] | {"value": 2}}
    assert "attention" not in table.cells(matched)[-1]


def test_a_program_for_one_length_is_counted_apart(table: ModuleType) -> None:
    row = GOOD | {"key": "causal:b", "one_shape": {"length": 16}}
    found = counted(table, row, GOOD)
    assert found["captured for one batch or length alone: examined at that"] == "1"
    assert found["FFN or experts proved"] == found["residual stream proved"] == "1"
    assert counted(table, row | {"onnx": 0.5})["a wrong result without an error"] == "1"
    assert "for one length (16) alone" in table.cells(row)[-1]
