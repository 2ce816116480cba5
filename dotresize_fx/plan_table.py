"""The width plan as text: one line a layer, dense -> slim."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dotresize_fx.regions import Region, RegionKind

_COLUMNS = {
    RegionKind.FFN: "FFN",
    RegionKind.EXPERTS: "experts",
    RegionKind.VALUE: "value head",
    RegionKind.QUERY_KEY: "query/key head",
    RegionKind.HEADS: "KV heads",
}
NONE = "-"
KEPT = "kept"


def plan_table(regions: Sequence[Region], widths: Mapping[str, int]) -> str:
    """Aligned lines without a line break at the end: the residual stream if it is cut, then one for each layer.

    A layer is what a region's name says up to its last number. Columns stand for the kinds of width that the plan
    names; of these, a region that it does not name is kept.
    """
    cells = {r.name: _cell(r.width, widths[r.name]) if r.name in widths else KEPT for r in regions}
    named = {region.kind for region in regions if region.name in widths}
    streams = [region for region in regions if region.kind is RegionKind.RESIDUAL and region.name in widths]
    others = [region for region in regions if region.kind in _COLUMNS and region.kind in named]
    layers: dict[str, dict[RegionKind, str]] = {}
    for region in others:
        layer = _layer(region)
        if region.kind in layers.get(layer, {}):  # several of a kind: each in a line of its own
            layer = region.name
        layers.setdefault(layer, {})[region.kind] = cells[region.name]
    kinds = [kind for kind in _COLUMNS if any(kind in row for row in layers.values())]
    rows = [["layer", *(_COLUMNS[kind] for kind in kinds)]] if layers else []
    rows += [[name, *(row.get(kind, NONE) for kind in kinds)] for name, row in layers.items()]
    lines = aligned(rows)
    lines[:0] = [f"  residual stream  {cells[region.name]}" for region in streams]
    return "\n".join(["width plan, dense -> slim", *lines])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Indented lines of cells in columns, without what would steer a terminal."""
    safe = [["".join(c if c.isprintable() else " " for c in cell) for cell in row] for row in rows]
    lengths = [max(map(len, column)) for column in zip(*safe, strict=True)]
    return [f"  {'  '.join(f'{cell:<{n}}' for cell, n in zip(row, lengths, strict=True)).rstrip()}" for row in safe]


def _layer(region: Region) -> str:
    found = re.match(r".*\d(?=\.|$)", region.name.removesuffix(f" {region.kind}"))
    return found[0] if found else region.name.removesuffix(f" {region.kind}")


def _cell(dense: int, slim: int) -> str:
    return f"{dense} -> {slim}" if slim < dense else str(dense)
