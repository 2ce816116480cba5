"""Bring a block's neurons, heads and their bases in line with another block's, without changing what it computes."""

from __future__ import annotations

from dataclasses import replace

import torch

from dotresize_fx.graph import Graph, Kind
from dotresize_fx.passes.cut_stream import apply_map
from dotresize_fx.passes.find_blocks import Block
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.fold_norm_gains import FoldNormGains
from dotresize_fx.region_map import RegionMap, selection
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.transport.align_regions import (
    HeadWeights,
    align_heads,
    align_neurons,
    align_scores,
    align_values,
)


def align_blocks(
    graph: Graph, first: Block, second: Block, turn: torch.Tensor | None = None, *, check: bool = False
) -> tuple[str, ...]:
    """Fold maps of full width into ``second`` that bring it near ``first``; returns what was done, a line a map.

    The two are of one form. Whole KV heads are matched first, then what is inside each, and neurons; what no map is
    known for (experts, heads behind a norm of their own) stays as it is. ``turn``: (d, d) orthogonal, for which the
    stream that ``second`` reads is that of ``first`` times it: with it the residual coordinates are matched too, where
    this brings the weights nearer. The graph then no longer computes what it did: the block is to be merged.
    """
    if turn is not None:
        trials = []
        for wanted in (None, turn):
            trial = graph.copy()
            done = turn_block(trial, first, second, wanted) if wanted is not None else True
            _align(trial, first, second, check)
            trials.append(distance(trial, first, second) if done else torch.inf)
        turn = turn if trials[1] < trials[0] else None
    records: tuple[str, ...] = ()
    if turn is not None:
        turn_block(graph, first, second, turn)
        records = (f"{second.end.name}: residual coordinates turned",)
    return records + _align(graph, first, second, check)


def distance(graph: Graph, first: Block, second: Block) -> float:
    """The sum of squares between the weights of two blocks of one form."""
    found = 0.0
    for one, other in zip(first.ops, second.ops, strict=True):
        a, b = graph.op(one), graph.op(other)
        if a.weight is not None and b.weight is not None:
            found += float((graph.weight(a).double() - graph.weight(b).double()).square().sum())
    return found


def _align(graph: Graph, first: Block, second: Block, check: bool) -> tuple[str, ...]:
    records = []
    for kinds in ((RegionKind.HEADS,), (RegionKind.QUERY_KEY, RegionKind.VALUE, RegionKind.FFN)):
        theirs, mine = (_regions(graph, block) for block in (first, second))
        for place, region in mine.items():
            if region.kind not in kinds or place not in theirs:
                continue
            found = _map(graph, region, theirs[place], mine, theirs)
            if found is not None:
                apply_map(graph, region, found, check)
                records.append(f"{region.name}: aligned with {theirs[place].name}")
    return tuple(records)


def _regions(graph: Graph, block: Block) -> dict[tuple[str, int], Region]:
    """The block's regions by kind and by which of its ops writes them first."""
    place = {name: i for i, name in enumerate(block.ops)}
    return {
        (region.kind, place[region.writers[0]]): region
        for region in find_regions(graph).regions
        if region.kind is not RegionKind.RESIDUAL and region.writers[0] in place
    }


Regions = dict[tuple[str, int], Region]


def _map(graph: Graph, region: Region, like: Region, mine: Regions, theirs: Regions) -> RegionMap | None:
    if region.kind is RegionKind.FFN:
        plain = region.symmetry is Symmetry.PERMUTATION and not region.keeps_apart and not region.places
        if not plain or region.norms or not _linears(graph, region) or len(region.readers) != 1:
            return None
        return align_neurons(graph, region, like)
    own, other = (_heads(graph, one, parts) for one, parts in ((region, mine), (like, theirs)))
    if region.kind is RegionKind.HEADS:
        if not ((own.values and other.values) or (own.scores and other.scores)):
            return None
        down = selection(align_heads(own, other), region.width)
        return RegionMap(down, down.T)
    if region.kind is RegionKind.VALUE:
        return align_values(own.values, other.values) if own.values and other.values else None
    return align_scores(own.scores, other.scores, rotary=own.rotary) if own.scores and other.scores else None


def _heads(graph: Graph, region: Region, parts: Regions) -> HeadWeights:
    """The weights of the region's attention, as far as its other regions are plain enough."""
    same = [one for one in parts.values() if one.attention == region.attention]
    value = next((one for one in same if one.kind is RegionKind.VALUE and _plain(graph, one, 1)), None)
    scores = next((one for one in same if one.kind is RegionKind.QUERY_KEY and _plain(graph, one, 2)), None)
    return HeadWeights.of(graph, value, scores)


def _plain(graph: Graph, region: Region, writers: int) -> bool:
    admitted = (Symmetry.HEADWISE_LINEAR, Symmetry.ROTARY_PAIRS)
    keys = len(region.key_writers) == 1 if region.kind is RegionKind.QUERY_KEY else len(region.readers) == 1
    return region.symmetry in admitted and len(region.writers) == writers and keys and _linears(graph, region)


def _linears(graph: Graph, region: Region) -> bool:
    return all(graph.op(name).kind is Kind.LINEAR for name in (*region.writers, *region.readers))


def turn_block(graph: Graph, first: Block, second: Block, turn: torch.Tensor) -> bool:
    """Write ``second`` in the stream's coordinates of ``first``; False, and nothing done, where no rotation passes.

    The gains of both blocks' norms are folded into what reads them.
    """
    inside = set(second.ops)
    streams = [one for one in find_regions(graph).of_kind(RegionKind.RESIDUAL) if inside & set(one.readers)]
    norms = [graph.op(name) for name in (*first.ops, *second.ops) if graph.op(name).kind in _NORMS]
    if len(streams) != 1 or streams[0].symmetry is not Symmetry.ORTHOGONAL:
        return False
    (stream,) = streams
    if any(op.kind is not Kind.RMS_NORM or op.name not in stream.norms for op in norms):
        return False
    FoldNormGains(replace(stream, norms=tuple(op.name for op in norms)))(graph)
    for name in (name for name in (*stream.writers, *stream.normed_readers) if name in inside):
        op = graph.op(name)
        weight, bias = graph.weight(op), graph.bias(op)
        if name in stream.writers:
            if bias is not None:
                graph.set_bias(op, (turn @ bias.double()).to(weight.dtype))
            graph.set_weight(graph.op(name), (turn @ weight.double()).to(weight.dtype))
        else:
            graph.set_weight(op, (weight.double() @ turn.T).to(weight.dtype))
    return True


_NORMS = (Kind.RMS_NORM, Kind.LAYER_NORM)
