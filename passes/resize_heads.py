"""Let the ops between an attention and its linears state the sizes that a map gives its heads."""

from __future__ import annotations

import math

import torch

from dotresize_fx.graph import Graph
from dotresize_fx.passes.pass_base import promise
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region, RegionKind, Symmetry


def check_heads(graph: Graph, region: Region, region_map: RegionMap) -> None:
    """Raise :class:`PassContractError` when the region's layout is not the graph's, or does not allow the map."""
    layout = region.layout
    assert layout is not None
    for name, axis in layout.sizes:
        size = graph.op(name).attributes["sizes"][axis]
        fits = size is None or size == -1 or size % region.width == 0
        promise(fits, f"{region.name}: {name} states {size}, no multiple of {region.width}: find the regions anew")
    for table, readers in layout.tables:
        read = all(table in {value.name for value in graph.op(name).inputs} for name in readers)
        promise(read, f"{region.name}: {table} is no table of it any more: find the regions anew")
    if region.symmetry is Symmetry.ROTARY_PAIRS:
        promise(region_map.down.ndim == 2, f"{region.name}: rotary pairs take one selection for all heads")
        taken = (region_map.down != 0).sum(0)
        promise(bool((taken == 1).all()), f"{region.name}: only a selection crosses a rotary embedding")
        promise(region_map.width % 2 == 0, f"{region.name}: {region_map.width} numbers cannot be paired")


def resize_heads(graph: Graph, region: Region, region_map: RegionMap) -> None:
    """Sizes of views and expands, halves and tables of a rotary embedding, and the scale where it was implied."""
    layout, n, k = region.layout, region.width, region_map.width
    assert layout is not None
    for name, axis in layout.sizes:
        op = graph.op(name)
        size = op.attributes["sizes"][axis]
        if size is not None and size != -1:
            graph.resize_axes(op, {axis: size // n * k})
    for name in layout.lower_halves:
        graph.resize_slice(graph.op(name), 0, k // 2)
    for name in layout.upper_halves:
        graph.resize_slice(graph.op(name), k // 2, None)
    if region.symmetry is Symmetry.ROTARY_PAIRS:
        _gather_tables(graph, region, region_map.down)
    attention = graph.op(region.attention)
    if region.kind is RegionKind.QUERY_KEY and attention.attributes["scale"] is None:
        graph.set_attention_scale(attention, 1 / math.sqrt(n))


def _gather_tables(graph: Graph, region: Region, down: torch.Tensor) -> None:
    """Cosines and sines of the numbers that are left, in their order; other attentions read the whole tables."""
    assert region.layout is not None
    places = down.abs().argmax(0).cpu()
    if torch.equal(places, torch.arange(region.width)):
        return
    for table, readers in region.layout.tables:
        users = [graph.op(name) for name in readers]
        source = next(value for value in users[0].inputs if value.name == table)
        graph.insert_gather(source, places, users=users, name="rotary_table")
