"""report.html: one self-contained page from a report, with its plots laid out here as plain SVG geometry.

Nothing on the page comes from elsewhere: no script, no font, no link; names out of model files are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dotresize_fx.report import figure_rows as words
from dotresize_fx.report.contents import (
    DecoderFidelity,
    EncoderFidelity,
    OutputFidelity,
    RegionRow,
    Report,
)
from dotresize_fx.report.format_rows import format_rows
from dotresize_fx.report.given_options import typed_options
from dotresize_fx.report.latency_plot import latency_plot
from dotresize_fx.report.precision_rows import precision_rows
from dotresize_fx.report.structure_tables import structure_tables
from dotresize_fx.report.templates import render

_KINDS = {
    "ffn": "FFN intermediate width",
    "residual": "Residual stream width",
    "value": "Width of a value head",
    "query_key": "Width of a query and key head",
    "kv_heads": "Number of KV heads",
}


@dataclass(frozen=True, slots=True)
class Tile:
    """One headline figure. ``tone`` is good, bad or plain."""

    label: str
    value: str
    unit: str
    note: str
    tone: str = "plain"


@dataclass(frozen=True, slots=True)
class RegionBar:
    """One region in the width plot; lengths in percent of the widest region of its kind."""

    row: RegionRow
    dense_percent: float
    slim_percent: float
    change: str
    error: str
    error_percent: float
    title: str


@dataclass(frozen=True, slots=True)
class RegionPlot:
    """All regions of one kind on one scale. ``name_length`` is the longest name's, in characters."""

    title: str
    bars: list[RegionBar]
    average: str
    name_length: int
    has_errors: bool


def render_page(report: Report) -> str:
    """The whole HTML document."""
    sides = {"dense": report.figures.dense.latency, "slim": report.figures.slim.latency}
    marks, ticks = latency_plot({name: latency for name, latency in sides.items() if latency is not None})
    stages = {name: seconds for name, seconds in report.stage_seconds.items() if name != "total"}
    longest = max(stages.values(), default=0.0)
    content: dict[str, Any] = {
        "report": report,
        "verdict": words.verdict_parts(report),
        "failed": report.figures.verification is not None and not report.figures.verification.passed,
        "tiles": _tiles(report),
        "rows": [*words.figure_rows(report), *precision_rows(report), *format_rows(report)],
        "plots": [_region_plot(kind, rows) for kind, rows in _by_kind(report.regions).items()],
        "structure": structure_tables(report),
        "marks": marks,
        "ticks": ticks,
        "conditions": words.conditions(marks[0].latency) if marks else "",
        "matched": [linear for linear in report.linears if linear.status == "matched"],
        "skipped": _by_reason(report),
        "stages": [
            (name, words.duration(seconds), 100 * seconds / longest if longest else 0.0)
            for name, seconds in stages.items()
        ],
        "total": words.duration(report.stage_seconds.get("total")),
        "peak_export": words.size(report.figures.peak_export_bytes),
        "peak_runtime": words.size(report.figures.peak_runtime_bytes),
        "options": typed_options(report.options),
        "number": words.number,
    }
    return render("page.html.j2", content)


def _tiles(report: Report) -> list[Tile]:
    """The four figures a deployment is decided on. Missing ones stay on the page and say so."""
    figures = report.figures
    dense, slim = figures.dense, figures.slim
    missing = ("–", "", words.NOT_MEASURED)

    removed = figures.block_weights_removed
    if removed is None:
        tiles = [Tile("Block weights removed", *missing)]
    else:
        value = words.share(removed).replace("-", "−")
        note = f"{words.count(dense.block_linear_weights)} → {words.count(slim.block_linear_weights)}"
        tiles = [Tile("Block weights removed", value, "", note, "good" if removed > 0 else "plain")]

    speed, better = words.speed(figures)
    if better is None and figures.speedup is None:
        tiles.append(Tile("Latency", *missing))
    else:
        value, _, unit = speed.partition(" ")
        tone = {True: "good", False: "bad", None: "plain"}[better]
        ends = [words.duration(side.median) for side in (dense.latency, slim.latency) if side is not None]
        tiles.append(Tile("Latency", value, unit.strip("()"), " → ".join(ends), tone))

    first = figures.fidelity[0] if figures.fidelity else None
    if isinstance(first, DecoderFidelity) and first.excess is not None:
        note = f"perplexity {words.number(first.dense_perplexity)} → {words.number(first.slim_perplexity)}"
        if first.top1_agreement is not None:
            note += f", top-1 agreement {words.share(first.top1_agreement)}"
        tiles.append(Tile("Excess", words.number(first.excess), "nats", note))
    elif isinstance(first, OutputFidelity) and first.relative_error is not None:
        tiles.append(Tile("Error of outputs", words.share(first.relative_error), "", "relative, on held-out inputs"))
    elif isinstance(first, EncoderFidelity) and first.mean_cosine is not None:
        tiles.append(Tile("Cosine to dense", f"{first.mean_cosine:.4f}", "", "pooled outputs, mean"))
    else:
        tiles.append(Tile("Fidelity", *missing))

    check = figures.verification
    if check is None:
        tiles.append(Tile("ONNX to what it stands for", *missing))
    else:
        limit = f"limit {words.number(check.tolerance)}"
        unit, tone = ("verified", "good") if check.passed else ("failed", "bad")
        tiles.append(Tile("ONNX to what it stands for", words.number(check.max_abs_difference), unit, limit, tone))
    return tiles


def _by_kind(regions: Iterable[RegionRow]) -> dict[str, list[RegionRow]]:
    kinds: dict[str, list[RegionRow]] = {}
    for region in regions:
        kinds.setdefault(region.kind, []).append(region)
    return kinds


def _region_plot(kind: str, rows: list[RegionRow]) -> RegionPlot:
    widest = max(max(row.width_before, row.width_after) for row in rows)
    errors = [row.error for row in rows if row.error is not None and math.isfinite(row.error)]
    largest = max(errors, default=0.0)
    bars = []
    for row in rows:
        percent = 100 * row.error / largest if row.error in errors and row.error and largest else 0.0
        title = [
            f"{row.name}: {row.width_before} → {row.width_after}",
            f"method: {row.method or 'left as it was'}; symmetry: {row.symmetry}",
            f"written by {', '.join(row.writers)}" if len(row.writers) < 9 else f"{len(row.writers)} writers",
            f"read by {', '.join(row.readers)}" if len(row.readers) < 9 else f"{len(row.readers)} readers",
            f"held-out error: {words.share(row.error)}",
            *(f"{name}: {f'{v:.3g}' if isinstance(v, float) else v}" for name, v in row.notes.items()),
        ]
        bars.append(
            RegionBar(
                row,
                100 * row.width_before / widest if widest else 0.0,
                100 * row.width_after / widest if widest else 0.0,
                words.change(row.width_before, row.width_after),
                words.share(row.error),
                percent,
                "\n".join(title),
            )
        )
    before, after = sum(row.width_before for row in rows), sum(row.width_after for row in rows)
    average = f"{before} → {after} in total, {words.change(before, after)}" if len(rows) > 1 else ""
    name_length = max(len(row.name) for row in rows)
    return RegionPlot(_KINDS.get(kind, kind), bars, average, min(name_length, 34), bool(errors))


def _by_reason(report: Report) -> list[tuple[str, list[Any]]]:
    """Skipped linears by reason, the commonest first: 120 times the same sentence tells less than once."""
    reasons: dict[str, list[Any]] = {}
    for linear in report.linears:
        if linear.status == "skipped":
            reasons.setdefault(linear.reason, []).append(linear)
    return sorted(reasons.items(), key=lambda item: -len(item[1]))
