"""Blocks that went and linears of a lower rank, as tables of the page."""

from __future__ import annotations

from dotresize_fx.report import figure_rows as words
from dotresize_fx.report.contents import Report
from dotresize_fx.report.table import Table


def structure_tables(report: Report) -> list[Table]:
    """None where widths alone changed."""
    tables = []
    if blocks := report.removed_blocks:
        rows = [
            (
                row.name or f"block {row.index}",
                f"{row.index}",
                "dropped" if row.merged_into is None else f"merged into {row.merged_into}",
                words.DASH if row.alpha is None else words.share(row.alpha),
            )
            for row in blocks
        ]
        columns = ("Block", "Number", "What became of it", "Its share there")
        tables.append(Table("Blocks that went", columns, rows, "numbers are those of the dense model, from 0 on"))
    if linears := report.low_rank_linears:
        cells = [
            (
                row.name,
                f"{row.d_out} × {row.d_in}",
                f"{row.rank}",
                words.change(row.d_out * row.d_in, row.rank * (row.d_out + row.d_in)),
                words.share(row.error),
            )
            for row in linears
        ]
        head = ("Linear", "Out × in", "Rank", "Weights", "Held-out error")
        detail = "each is two now; the error is relative, of its output on tokens that did not calibrate it"
        tables.append(Table("Linears of a lower rank", head, cells, detail))
    return tables
