"""The ablation's table: pairs of members, over seeds."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import line
from ot_formulations import FORMULATIONS

EFFORTS = ("fast", "best")

Row = Mapping[str, Any]


def read_rows(files: Sequence[Path]) -> list[Row]:
    """The rows of several runs."""
    entries = [json.loads(text) for file in files for text in file.read_text(encoding="utf-8").splitlines()]
    return [entry for entry in entries if entry["kind"] == "row"]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line a formulation, cut and effort, over the seeds that both members were measured with."""
    found: dict[tuple[str, float, str], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        found[row["member"], row["ratio"], row["effort"]][row["seed"]] = row
    lines = []
    for name, pair in FORMULATIONS.items():
        for ratio in sorted({row["ratio"] for row in rows}):
            for effort in EFFORTS:
                ours, theirs = (found[member, ratio, effort] for member in (pair.transport, pair.without))
                if seeds := sorted(ours.keys() & theirs.keys()):
                    lines.append([name, f"{ratio:.0%}", effort, str(len(seeds)), *_cells(ours, theirs, seeds)])
    return lines


def _cells(ours: Mapping[int, Row], theirs: Mapping[int, Row], seeds: Sequence[int]) -> list[str]:
    off = statistics.fmean(ours[seed]["weights_off"] for seed in seeds)
    cells = [f"{off:.1%}"]
    for figure in ("excess", "kl", "other"):
        pairs = [(ours[seed][figure], theirs[seed][figure]) for seed in seeds]
        cells += [spread([first for first, _ in pairs]), spread([second for _, second in pairs])]
        cells.append(spread([first - second for first, second in pairs], signed=True))
    return cells


def spread(values: Sequence[float], *, signed: bool = False) -> str:
    """Mean and standard deviation; a signed one in bold where the mean is further from zero than that."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.4f}" if signed else f"{mean:.4f}"
    deviation = statistics.stdev(values)
    words = f"{mean:{'+' if signed else ''}.4f} +- {deviation:.4f}"
    return f"**{words}**" if signed and abs(mean) > deviation else words


def print_table(rows: Sequence[Row]) -> None:
    columns = ["formulation", "cut", "effort", "seeds", "weights off"]
    for figure in ("excess", "KL", "other"):
        columns += [f"{figure} with", f"{figure} without", f"{figure} difference"]
    line(columns)
    line(["---"] * len(columns))
    for cells in table(rows):
        line(cells)
