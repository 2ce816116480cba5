"""Let the ops between an attention and its linears state the sizes that a map gives its heads."""

from __future__ import annotations

import math

import torch

from dotresize_fx.graph import Graph
from dotresize_fx.passes.pass_base import promise
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.rotary_map import mixes_pairs


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
    for name in layout.cache if region_map.width != region.width else ():
        promise(name in graph.caches, f"{region.name}: {name} is an output that has to keep its size")
    if region.symmetry is Symmetry.ROTARY_PAIRS:
        _check_pairs(region, region_map)


def _check_pairs(region: Region, region_map: RegionMap) -> None:
    """Only what mixes whole pairs commutes with turning them, and the tables have to be told which are left."""
    k, pairs = region_map.width, region_map.pairs
    promise(k % 2 == 0, f"{region.name}: {k} numbers cannot be paired")
    promise(pairs is not None, f"{region.name}: a map of rotary pairs must name the pairs whose tables it keeps")
    assert pairs is not None
    known = pairs.shape == (k // 2,) and bool(((pairs >= 0) & (pairs < region.width // 2)).all())
    promise(known, f"{region.name}: {pairs.tolist()} are not {k // 2} of its {region.width // 2} rotary pairs")
    for matrix in (region_map.down, region_map.key_down):
        whole = matrix is None or mixes_pairs(matrix)
        promise(whole, f"{region.name}: only what mixes whole pairs crosses a rotary embedding")


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
        assert region_map.pairs is not None
        _gather_tables(graph, region, region_map.pairs)
    for name in layout.cache if n != k else ():
        graph.resize_input(graph.caches[name], {1 if region.kind is RegionKind.HEADS else 3: k})
    attention = graph.op(region.attention)
    if region.kind is RegionKind.QUERY_KEY and attention.attributes["scale"] is None:
        graph.set_attention_scale(attention, 1 / math.sqrt(n))


def _gather_tables(graph: Graph, region: Region, pairs: torch.Tensor) -> None:
    """Cosines and sines of the pairs that are left, in their order; other attentions read the whole tables."""
    assert region.layout is not None
    half = region.width // 2
    if torch.equal(pairs.cpu(), torch.arange(half)):
        return
    for table, readers in region.layout.tables:
        users = [graph.op(name) for name in readers]
        source = next(value for value in users[0].inputs if value.name == table)
        places = (pairs if source.width == half else torch.cat([pairs, pairs + half])).cpu()
        graph.insert_gather(source, places, users=users, name="rotary_table")
