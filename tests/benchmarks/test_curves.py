"""The figure of fidelity against the share removed: well-formed, and every point tells its values."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def curves(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("curves")


def row(method: str, ratio: float, same: float | None, other: float | None = 0.5) -> dict[str, Any]:
    figures = {"ratio": ratio, "weights_off": ratio + 0.001, "same_source": same, "other_source": other}
    return {"kind": "row", "method": method} | figures


def write(file: Path, *entries: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return file


def test_rows_of_all_files_make_one_curve_a_method(curves: ModuleType, tmp_path: Path) -> None:
    first = write(tmp_path / "a", {"kind": "run"}, row("best", 0.3, 0.2), row("modegpt", 0.3, 9.0))
    second = write(tmp_path / "b", row("best", 0.1, 0.1), row("best", 0.3, 0.25), row("magnitude", 0.1, 1.0))
    found = curves.read_curves([first, second], curves.METHODS)
    assert list(found) == ["magnitude", "best"]
    assert [(point.removed, point.excess["same_source"]) for point in found["best"]] == [(0.101, 0.1), (0.301, 0.25)]


def test_every_point_is_drawn_inside_and_says_its_values(curves: ModuleType, tmp_path: Path) -> None:
    rows = [row(m, r / 10, 0.03 * r**2, 0.05 * r**2) for m in curves.METHODS for r in (1, 3, 6)]
    root = ElementTree.fromstring(curves.draw(curves.read_curves([write(tmp_path / "a", *rows)], curves.METHODS)))
    circles = [circle for circle in root.iter(f"{SVG}circle") if circle.find(f"{SVG}title") is not None]
    assert len(circles) == 2 * len(rows)
    assert "magnitude, 10.1% removed" in str(circles[0][0].text)
    assert "excess 0.030 nats" in str(circles[0][0].text)
    _, _, width, height = (float(part) for part in root.attrib["viewBox"].split())
    assert all(0 < float(c.attrib["cx"]) < width and 0 < float(c.attrib["cy"]) < height for c in circles)


def test_more_excess_stands_higher_and_none_leaves_the_panel(curves: ModuleType, tmp_path: Path) -> None:
    rows = [row("best", 0.1, -0.2, None), row("best", 0.2, 0.1, None), row("best", 0.3, 40.0, None)]
    root = ElementTree.fromstring(curves.draw(curves.read_curves([write(tmp_path / "a", *rows)], curves.METHODS)))
    heights = [float(c.attrib["cy"]) for c in root.iter(f"{SVG}circle") if c.find(f"{SVG}title") is not None]
    assert len(heights) == 3
    bottom, middle, top = heights
    assert curves.TOP <= top < middle < bottom <= curves.HEIGHT - curves.BOTTOM


def test_the_table_leaves_out_what_is_not_known(curves: ModuleType, tmp_path: Path) -> None:
    found = curves.read_curves([write(tmp_path / "a", row("fast", 0.2, 0.123, None))], curves.METHODS)
    assert curves.table(found).splitlines()[-1] == "| fast | 20.1% | 0.123 |  |"
