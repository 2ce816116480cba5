"""Ranks and depth as text, in the form of the width plan: one line a layer, one a block that goes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from dotresize_fx.depth.gone_block import GoneBlock
from dotresize_fx.plan_table import NONE, aligned
from dotresize_fx.rank.low_rank_linear import LowRankLinear

_LAYER = re.compile(r"(.*\d)\.(?!.*\.\d+(?:\.|$))(.+)")


def rank_table(linears: Sequence[LowRankLinear]) -> str:
    """Aligned lines without a line break at the end, a column for each part of a layer; a linear whose name tells no
    layer has a line of its own.
    """
    places = [_place(one.name) for one in linears]
    short = [(layer, part.rpartition(".")[2]) for layer, part in places]
    if max(Counter(short).values(), default=0) == 1:
        places = short
    parts = list(dict.fromkeys(part for _, part in places))
    layers: dict[str, dict[str, str]] = {}
    for (layer, part), one in zip(places, linears, strict=True):
        layers.setdefault(layer, {})[part] = f"{min(one.rows, one.columns)} -> {one.rank}"
    rows = [["layer", *parts], *([layer, *(row.get(part, NONE) for part in parts)] for layer, row in layers.items())]
    return "\n".join(["rank plan, full -> slim", *aligned(rows)])


def depth_table(blocks: Sequence[GoneBlock]) -> str:
    """Aligned lines without a line break at the end."""
    rows = [
        [
            f"{block.number}",
            block.name or NONE,
            "dropped" if block.into is None else f"merged into {block.into}, of which it is {block.alpha:.0%}",
        ]
        for block in sorted(blocks, key=lambda one: one.number)
    ]
    return "\n".join(["blocks that go, counted from 0", *aligned(rows)])


def _place(name: str) -> tuple[str, str]:
    """Of "model.layers.3.mlp.up_proj" the layer, "model.layers.3", and the rest."""
    found = _LAYER.fullmatch(name)
    return (found[1], found[2]) if found else (name, "rank")
