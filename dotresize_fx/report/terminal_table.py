"""The report as plain text: one dense/slim table, at most 100 columns, no colours, no dependency."""

from __future__ import annotations

import sys
import textwrap

from dotresize_fx.regions import counted
from dotresize_fx.report.contents import Report
from dotresize_fx.report.figure_rows import NOT_MEASURED, duration, figure_rows, size, verdict
from dotresize_fx.report.format_rows import format_rows
from dotresize_fx.report.precision_rows import precision_rows

WIDTH = 100
_COLUMNS = (18, 18, 26)  # dense, slim, change; the label takes what is left of WIDTH
_LABEL = WIDTH - sum(_COLUMNS)
_ASCII = str.maketrans({"–": "-", "±": "+-", "×": "x", "µ": "u", "→": "->", "─": "-"})


def terminal_table(report: Report, *, ascii_only: bool | None = None) -> str:
    """The whole table, ending without a line break; no line is longer than 100 columns.

    ``ascii_only`` keeps to ASCII; left out, it follows the encoding of standard output.
    """
    ascii_only = takes_ascii() if ascii_only is None else ascii_only
    figures = report.figures
    rule = plain_text("─", ascii_only) * WIDTH
    lines = wrapped(f"{report.model.name} ({report.model.task}): {verdict(report)}", 0, ascii_only)
    lines += [rule, _line(("", "dense", "slim", "change"), ascii_only), rule]
    for row in (*figure_rows(report), *precision_rows(report), *format_rows(report)):
        lines.append(_line((row.label, row.dense, row.slim, row.change), ascii_only))
        lines += wrapped(row.detail, 2, ascii_only)
    changed = sum(region.width_before != region.width_after for region in report.regions)
    matched = sum(linear.status == "matched" for linear in report.linears)
    why = "" if matched == len(report.linears) else ", report.html says why the others were skipped"
    total = duration(report.stage_seconds.get("total"))
    structure = [
        *([f"{counted(len(report.removed_blocks), 'block')} went"] if report.removed_blocks else []),
        *([f"{counted(len(report.low_rank_linears), 'linear')} of a lower rank"] if report.low_rank_linears else []),
    ]
    closing = [
        f"{'; '.join([*structure, f'{changed} of {len(report.regions)} regions narrowed'])}; "
        f"{matched} of {len(report.linears)} linears matched{why}.",
        f"Peak memory: export {size(figures.peak_export_bytes)}, "
        f"ONNX Runtime child {size(figures.peak_runtime_bytes)}; "
        f"{'took' if total != NOT_MEASURED else 'time'} {total}.",
        *(f"Note: {note}" for note in report.notes),
    ]
    return "\n".join([*lines, rule, *(line for text in closing for line in wrapped(text, 0, ascii_only))])


def takes_ascii() -> bool:
    """Whether standard output is not known to take more."""
    return "utf" not in (getattr(sys.stdout, "encoding", None) or "").lower()


def plain_text(text: str, ascii_only: bool) -> str:
    """``text`` without what would steer a terminal (names come from model files), in ASCII if asked for."""
    # A hyphen for the minus sign even in UTF-8: figures copied from a terminal should parse.
    safe = "".join(character if character.isprintable() else " " for character in text.replace("−", "-"))
    return safe.translate(_ASCII).encode("ascii", "replace").decode("ascii") if ascii_only else safe


def _line(cells: tuple[str, str, str, str], ascii_only: bool) -> str:
    label, *figures = (plain_text(cell, ascii_only) for cell in cells)
    aligned = (f"{cell:>{width}}" for cell, width in zip(figures, _COLUMNS, strict=True))
    return f"{label:<{_LABEL}}{''.join(aligned)}".rstrip()


def wrapped(text: str, indent: int, ascii_only: bool) -> list[str]:
    """``text`` as :func:`plain_text` in lines of at most WIDTH, later ones indented more."""
    start = " " * indent
    return textwrap.wrap(plain_text(text, ascii_only), WIDTH, initial_indent=start, subsequent_indent=f"{start}  ")
