"""Leave out the last rows of regions: a model of other widths without any solving, whose numbers mean nothing much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Graph
from dotresize_fx.passes.cut_stream import apply_map
from dotresize_fx.passes.open_stream import open_stream
from dotresize_fx.region_map import RegionMap, pair_selection, selection
from dotresize_fx.regions import Region, RegionKind, Symmetry


def truncate_regions(dense: FxGraph, regions: Sequence[Region], widths: Mapping[str, int]) -> FxGraph:
    """A copy in which every region that ``widths`` makes narrower keeps its first rows alone.

    Of rotary pairs each region keeps some drawn for it, as solved ones have pairs of their own: those that keep the
    same would read one table. Whole KV heads and widths of the same attention's heads are not both to be cut.
    """
    graph = dense.copy()
    for i, region in enumerate(regions):
        narrow = widths.get(region.name, region.width)
        if narrow == region.width:
            continue
        if region.kind is RegionKind.RESIDUAL:
            region, _ = open_stream(graph, region)
        if region.kind in (RegionKind.FFN, RegionKind.EXPERTS):
            _truncate(graph, region, narrow)
            continue
        if region.symmetry is Symmetry.ROTARY_PAIRS:
            drawn = torch.randperm(region.width // 2, generator=torch.Generator().manual_seed(i))
            pairs = drawn[: narrow // 2].sort().values
            apply_map(graph, region, pair_selection(pairs, region.width), check=False)
            continue
        down = selection(torch.arange(narrow), region.width)
        apply_map(graph, region, RegionMap(down, down.mT.contiguous()), check=False)
    graph.refresh_shapes()
    return graph


def _truncate(graph: Graph, region: Region, narrow: int) -> None:
    """What a map would do to an FFN, without multiplying: nothing between its linears states the width."""
    for name in region.writers:
        op = graph.op(name)
        bias = graph.bias(op) if op.is_linear else None
        weight = graph.weight(op)
        graph.set_weight(op, (weight[..., :narrow, :] if op.is_linear else weight[:, :narrow]).clone())
        if bias is not None:
            graph.set_bias(graph.op(name), bias[:narrow].clone())
    for name in region.readers:
        graph.set_weight(graph.op(name), graph.weight(graph.op(name))[..., :narrow].clone())
