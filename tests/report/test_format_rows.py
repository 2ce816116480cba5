"""One row for each format beside ONNX."""

from __future__ import annotations

import dataclasses

from dotresize_fx.report.contents import Figures, FormatFigures, Machine, ModelSource, Report, Verification
from dotresize_fx.report.format_rows import format_rows
from dotresize_fx.report.page import render_page
from dotresize_fx.report.terminal_table import terminal_table

PLAIN = Report(
    tool_version="0.1.0",
    packages={},
    machine=Machine(cpu="a CPU", threads=2, platform="Linux"),
    model=ModelSource(name="tiny", description="random weights", task="decoder"),
    options={},
    seed=0,
)
CHECK = Verification(max_abs_difference=1.2e-6, tolerance=1e-3, max_abs_output=0.5, cases=10)
OPENVINO = FormatFigures(
    format="openvino", folder="openvino", runtime="openvino 1", file_bytes=2000, verification=CHECK
)


def test_a_row_says_difference_folder_and_runtime() -> None:
    assert format_rows(PLAIN) == []
    report = dataclasses.replace(PLAIN, figures=Figures(formats=(OPENVINO,)))
    (row,) = format_rows(report)
    assert (row.label, row.slim, row.change, row.better) == ("openvino: to slim program", "1.2e-6", "within 1e-3", True)
    assert row.detail == "openvino/, 2.0 kB, run in openvino 1 on 10 cases"
    assert row.label in terminal_table(report)
    assert row.detail in render_page(report)
    assert report.to_json()["figures"]["formats"][0]["verification"]["cases"] == 10
