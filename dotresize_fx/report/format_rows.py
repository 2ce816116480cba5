"""What the table says of other formats than ONNX: a row each."""

from __future__ import annotations

from dotresize_fx.report.contents import Report
from dotresize_fx.report.figure_rows import DASH, FigureRow, number, size


def format_rows(report: Report) -> list[FigureRow]:
    """Rows in the columns of :func:`figure_rows`; none without other formats."""
    rows = []
    for found in report.figures.formats:
        check = found.verification
        limit = f"{'within' if check.passed else 'over'} {number(check.tolerance)}"
        detail = f"{found.folder}/, {size(found.file_bytes)}, run in {found.runtime} on {check.cases} cases"
        label = f"{found.format}: to slim program"
        rows.append(FigureRow(label, DASH, number(check.max_abs_difference), limit, check.passed, detail))
    return rows
