"""Fidelity against the share removed, as a figure and as a table, from what fidelity.py --json wrote.

    python benchmarks/curves.py fidelity.jsonl more.jsonl                    # draws docs/fidelity-curves.svg

Of several rows of one method and ratio the last one counts. The figure has one panel a kind of text and a logarithmic
axis; points below its end are drawn there. Every point says its values when it is pointed at.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

METHODS = ("magnitude", "fast", "best", "heal")
SOURCES = {"same_source": "text of the calibration's sources", "other_source": "text of other sources"}
FLOOR = 0.01
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 880, 400, 64, 48, 88, 60
LIGHT = ("#1f2328", "#d0d7de", "#8250df", "#0969da", "#bc4c00", "#1a7f37", "#bf3989")
DARK = ("#e6edf3", "#3d444d", "#bc8cff", "#58a6ff", "#f0883e", "#56d364", "#ff7bbd")
COLOURS = len(LIGHT) - 2


def _colours(ink: str, faint: str, *colours: str) -> str:
    rules = [f"text {{ fill: {ink}; }} .grid {{ stroke: {faint}; }}"]
    rules += [f".l{i} {{ stroke: {colour}; }} .p{i} {{ fill: {colour}; }}" for i, colour in enumerate(colours)]
    return "\n".join(rules)


# Plain rules: not every program that shows SVG knows variables.
STYLE = f"""
text {{ font: 13px system-ui, sans-serif; }} .title {{ font-weight: 600; }}
.line {{ fill: none; stroke-width: 2; }}
{_colours(*LIGHT)}
@media (prefers-color-scheme: dark) {{
{_colours(*DARK)}
}}
"""


@dataclass(frozen=True)
class Point:
    """``removed`` is a share; ``excess`` is by the keys of SOURCES, in nats, None where it is not finite."""

    removed: float
    excess: Mapping[str, float | None]


Curves = dict[str, list[Point]]


def read_curves(files: Sequence[Path], methods: Sequence[str]) -> Curves:
    """By method, in their order, points by the share removed; methods without rows are left out."""
    found: dict[str, dict[float, Point]] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry["kind"] == "row" and entry["method"] in methods:
                point = Point(entry["weights_off"], {source: entry[source] for source in SOURCES})
                found.setdefault(entry["method"], {})[entry["ratio"]] = point
    return {m: sorted(found[m].values(), key=lambda point: point.removed) for m in methods if m in found}


def draw(curves: Curves) -> str:
    """The figure as SVG."""
    points = [point for found in curves.values() for point in found]
    values = [v for point in points for v in point.excess.values() if v is not None]
    highest = 10.0 ** math.ceil(math.log10(max([*values, 10 * FLOOR])))
    left, right = _x_range([point.removed for point in points])
    wide, tall = (WIDTH - LEFT - GAP - 16) / 2, HEIGHT - TOP - BOTTOM

    def y_of(excess: float) -> float:
        return TOP + tall * (1 - math.log(max(excess, FLOOR) / FLOOR) / math.log(highest / FLOOR))

    parts = []
    for panel, (source, said) in enumerate(SOURCES.items()):
        start = LEFT + panel * (wide + GAP)

        def x_of(removed: float, start: float = start) -> float:
            return start + wide * (removed - left) / (right - left)

        parts.append(f'<text class="title" x="{start:.0f}" y="{TOP - 16}">{said}</text>')
        for tick in _ticks(highest):
            y = y_of(tick)
            parts.append(f'<line class="grid" x1="{start:.1f}" x2="{start + wide:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            if panel == 0:
                parts.append(f'<text x="{start - 8:.0f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for tenth in range(round(left * 10), round(right * 10) + 1):
            x = x_of(tenth / 10)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + tall}"/>')
            parts.append(f'<text x="{x:.1f}" y="{TOP + tall + 18}" text-anchor="middle">{tenth * 10} %</text>')
        middle = start + wide / 2
        parts.append(f'<text x="{middle:.1f}" y="{TOP + tall + 40}" text-anchor="middle">block weights removed</text>')
        for number, (method, found) in enumerate(curves.items()):
            drawn = [(point, excess) for point in found if (excess := point.excess[source]) is not None]
            places = [(x_of(point.removed), y_of(excess)) for point, excess in drawn]
            colour = number % COLOURS
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="line l{colour}" points="{path}"/>')
            for (point, excess), (x, y) in zip(drawn, places, strict=True):
                title = escape(f"{method}, {point.removed:.1%} removed, {said}: excess {excess:.3f} nats")
                circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="p{colour}">'
                parts.append(f"{circle}<title>{title}</title></circle>")
    y = TOP + tall / 2
    label = "excess, nats (logarithmic)"
    parts.append(f'<text x="18" y="{y:.0f}" text-anchor="middle" transform="rotate(-90 18 {y:.0f})">{label}</text>')
    for number, method in enumerate(curves):
        x, y = LEFT + 130 * number, HEIGHT - 20
        colour = number % COLOURS
        parts.append(f'<line class="line l{colour}" x1="{x}" x2="{x + 24}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle cx="{x + 12}" cy="{y}" r="4.5" class="p{colour}"/>')
        parts.append(f'<text x="{x + 32}" y="{y + 4}">{escape(method)}</text>')
    said = "Excess of the slim model over the dense one against the share of block weights removed"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def _x_range(removed: Sequence[float]) -> tuple[float, float]:
    """Whole tenths around the points, at least one."""
    left, right = math.floor(min(removed) * 10 + 0.05), math.ceil(max(removed) * 10 - 0.05)
    return left / 10, max(right, left + 1) / 10


def _ticks(highest: float) -> list[float]:
    decades = round(math.log10(highest / FLOOR))
    ticks = [FLOOR * 10**decade * step for decade in range(decades) for step in (1, 2, 5)]
    return [*ticks, highest]


def table(curves: Curves) -> str:
    """The points as markdown."""
    rows = ["| method | weights off | same source | other source |", "|---|---|---|---|"]
    for method, found in curves.items():
        for point in found:
            cells = ["" if point.excess[s] is None else f"{point.excess[s]:.3f}" for s in SOURCES]
            rows.append(f"| {method} | {point.removed:.1%} | {' | '.join(cells)} |")
    return "\n".join(rows)


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    default = Path(__file__).parents[1] / "docs" / "fidelity-curves.svg"
    parser.add_argument("--out", type=Path, default=default)
    return parser.parse_args(given)


def main() -> None:
    arguments = parse()
    curves = read_curves(arguments.files, arguments.methods)
    if not curves:
        raise SystemExit(f"no rows of {', '.join(arguments.methods)} in {', '.join(map(str, arguments.files))}")
    arguments.out.write_text(draw(curves), encoding="utf-8")
    print(table(curves))


if __name__ == "__main__":
    main()
