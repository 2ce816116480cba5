"""Latencies side by side, laid out as plain SVG geometry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dotresize_fx.report import figure_rows as words
from dotresize_fx.report.contents import Latency


@dataclass(frozen=True, slots=True)
class LatencyMark:
    """One model in the plot; places in percent of the axis. ``beyond`` names a maximum outside it.

    ``tone`` is dense for the first one, which the others are compared with, and slim for these.
    """

    name: str
    tone: str
    latency: Latency
    low: float
    high: float
    quartile_1: float
    quartile_3: float
    median: float
    text: str
    beyond: str
    title: str


def latency_plot(measured: Mapping[str, Latency]) -> tuple[list[LatencyMark], list[tuple[float, str]]]:
    """Marks and axis ticks (percent, label). The axis starts at zero, so that lengths can be compared."""
    if not measured:
        return [], []
    # One disturbed run on a shared machine must not press everything else into a corner.
    bound = 1.6 * max(latency.p75 for latency in measured.values())
    end = min(max(latency.max for latency in measured.values()), bound) * 1.04 or 1.0
    rough = end / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if power * factor >= rough)

    def place(seconds: float) -> float:
        return min(100 * seconds / end, 100.0)

    marks: list[LatencyMark] = []
    for name, item in measured.items():
        middle = f"quartiles {words.duration(item.p25)} to {words.duration(item.p75)}"
        ends = f"fastest {words.duration(item.min)}, slowest {words.duration(item.max)}"
        title = f"{name}: median {words.duration(item.median)}, {middle}, {ends}, {item.runs} runs"
        beyond = f"slowest {words.duration(item.max)} →" if item.max > end else ""
        marks.append(
            LatencyMark(
                name=name,
                tone="slim" if marks else "dense",
                latency=item,
                low=place(item.min),
                high=place(item.max),
                quartile_1=place(item.p25),
                quartile_3=place(item.p75),
                median=place(item.median),
                text=words.spread(item),
                beyond=beyond,
                title=title,
            )
        )
    factor, unit = (1.0, "s") if step >= 1 else (1e3, "ms") if step >= 1e-3 else (1e6, "µs")
    ticks = [
        (place(index * step), f"{index * step * factor:g} {unit}" if index else "0")
        for index in range(int(end / step) + 1)
    ]
    return marks, ticks
