"""Cut the residual stream of a graph, in one basis for all layers or in one a sublayer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dotresize_fx.cost import CostModel, block_linears
from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Graph, Kind, Op
from dotresize_fx.options import Options
from dotresize_fx.passes.choose_regions import why_not_cut
from dotresize_fx.passes.find_heads import QK_NORM
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.fold_linears import FoldLinears
from dotresize_fx.passes.follow_heads import ALL_HEADS_NORM
from dotresize_fx.passes.insert_adapters import ADAPTER, InsertAdapters, post_norms
from dotresize_fx.passes.insert_maps import InsertMaps
from dotresize_fx.passes.open_stream import open_stream
from dotresize_fx.progress import Progress
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import MatchReport, Region, RegionKind
from dotresize_fx.slim_stream import SlimStream
from dotresize_fx.solvers import solvers_for
from dotresize_fx.stream import stream_statistics
from dotresize_fx.sweep import SweptRegion
from dotresize_fx.width_plan import plan_uniformly, step_of


def apply_map(graph: Graph, region: Region, found: RegionMap, check: bool) -> None:
    """Insert a map and fold it."""
    insert = InsertMaps(region, found)
    insert(graph, check=check)
    FoldLinears(insert.downs, insert.ups)(graph, check=check)


def cuttable_streams(graph: FxGraph, matches: MatchReport) -> list[Region]:
    """The streams that can be opened for a map."""
    return [region for region in matches.of_kind(RegionKind.RESIDUAL) if not why_not_cut(graph, region)]


def widest_stream(graph: FxGraph, matches: MatchReport) -> Region:
    """The stream that most linears read.

    Raises:
        NothingToSlimError: there is none that can be cut; the message says why.
    """
    streams = cuttable_streams(graph, matches)
    if not streams:
        reasons = {row.writes_reason for row in matches.linears if "norm" in row.writes_reason}
        reasons = {reason for reason in reasons if not any(norm in reason for norm in (QK_NORM, ALL_HEADS_NORM))}
        reasons |= {why_not_cut(graph, region) for region in matches.of_kind(RegionKind.RESIDUAL)}
        why = min(reasons, default="no width that norms and blocks share was found")
        instead = "--basis sublayer or --regions ffn" if post_norms(graph) else "--regions ffn"
        raise NothingToSlimError(f"the residual stream cannot be cut: {why}; use {instead}")
    return max(streams, key=lambda r: len(r.readers))


@dataclass(frozen=True)
class StreamCut:
    """What was cut, how the dense stream is seen in the slim one's coordinates, and notes for the report."""

    swept: SweptRegion
    stream: SlimStream
    notes: tuple[str, ...] = ()


def cut_stream(
    graph: FxGraph,
    matches: MatchReport,
    batches: Sequence[Mapping[str, torch.Tensor]],
    cost: CostModel,
    ratio: float,
    options: Options,
    progress: Progress,
    width: int | None = None,
    factor: int = 1,
) -> StreamCut:
    """Cut it by ``ratio`` of what the graph costs, to a multiple of ``factor``, or to ``width``; in one basis for all
    layers or one a sublayer.

    Raises:
        NothingToSlimError: it cannot be cut, or not by that much.
    """
    known = {op.name for op in graph.ops} - {op.name for op in _adapters(graph.ops)}
    total = cost.total(graph) - _adapter_weights(graph)
    first, streams, centred = _opened(graph, matches, options)
    if width is None:
        width = _width(graph, first, streams, cost, total, ratio, options, factor)
    with progress.stage("stream statistics", len(batches)) as step:
        statistics = stream_statistics(graph, streams, batches, step)
    name, solver = solvers_for(options.method, first.kind)[0]
    cut = []
    notes: Mapping[str, float | int | str] = {}
    for stream, seen in zip(streams, statistics, strict=True):
        found = solver(stream, seen, width)
        apply_map(graph, stream, found, options.check)
        cut.append((stream, found.down - found.down.mean(0) if centred else found.down))
        notes = notes or found.notes
    swept = SweptRegion(first, width, name, None, notes)
    return StreamCut(swept, SlimStream.of(cut), _price(graph, known, len(streams)))


def _opened(graph: FxGraph, matches: MatchReport, options: Options) -> tuple[Region, list[Region], bool]:
    """The stream as it was found, the parts of it that get a basis each, and whether their means were taken away.

    A post-norm stream was parted before it was found (:class:`InsertPostNormAdapters`).
    """
    first = widest_stream(graph, matches)
    parted = [r for r in cuttable_streams(graph, matches) if options.basis == "sublayer" and _behind_adapter(graph, r)]
    centred = any(graph.op(name).kind is Kind.LAYER_NORM for name in first.norms)
    if parted:
        for norms in {region.norms: None for region in (first, *parted)}:
            region = next(r for r in find_regions(graph).of_kind(first.kind) if r.norms == norms)
            open_stream(graph, region)
        readers = {name for region in (first, *parted) for name in region.normed_readers}
    else:
        opened, _ = open_stream(graph, first)
        if options.basis == "shared":
            return first, [opened], centred
        InsertAdapters(opened)(graph, check=options.check)
        readers = set(opened.normed_readers)
    found = find_regions(graph).of_kind(first.kind)
    return first, [region for region in found if readers & set(region.normed_readers)], centred


def _adapters(ops: Sequence[Op]) -> list[Op]:
    return [op for op in ops if op.kind is Kind.LINEAR and ADAPTER in op.name]


def _adapter_weights(graph: FxGraph) -> int:
    """Of the blocks: one in front of an output is none of theirs."""
    return sum(graph.weight(op).numel() for op in _adapters(block_linears(graph)))


def _behind_adapter(graph: FxGraph, region: Region) -> bool:
    return any(ADAPTER in name for name in (*region.writers, *region.readers))


def _width(
    graph: FxGraph,
    first: Region,
    streams: Sequence[Region],
    cost: CostModel,
    total: int,
    ratio: float,
    options: Options,
    factor: int,
) -> int:
    """The width that leaves ``1 - ratio`` of ``total``, adapters counted."""
    step = step_of(first, options.multiple, factor, options.finest_step)
    if len(streams) == 1:
        units = {streams[0].name: cost.per_unit(graph, streams[0])}
        return plan_uniformly(streams, units, total, ratio, steps={streams[0].name: step}, cost=cost.name).widths[
            streams[0].name
        ]
    adapters = _adapter_weights(graph)
    linear = cost.total(graph) - adapters
    unit = sum(cost.per_unit(graph, region) for region in streams) - 2 * adapters // first.width
    widths = range(first.width // step * step, 0, -step)
    fixed = linear - unit * first.width

    def left(width: int) -> float:
        return fixed + unit * width + adapters * (width / first.width) ** 2

    wanted = (1 - ratio) * total
    if left(widths[-1]) > wanted:
        raise NothingToSlimError(
            f"adapters and all: the residual stream holds too little for --ratio {ratio}; use less"
        )
    return min(widths, key=lambda width: abs(left(width) - wanted))


def _price(graph: FxGraph, known: set[str], bases: int) -> tuple[str, ...]:
    """What linears opening the stream put in, ``known`` aside: adapters, and what keeps a head tied to its table."""
    added = [op for op in graph.ops if op.kind is Kind.LINEAR and op.name not in known]
    adapters = _adapters(added)
    weights = sum(graph.weight(op).numel() for op in adapters)
    said = (f"{bases} bases, one a sublayer, and {len(adapters)} adapters between them ({weights} weights)",)
    return (said if adapters else ()) + _price_of_ties(graph, [op for op in added if op not in adapters])


def _price_of_ties(graph: FxGraph, added: list[Op]) -> tuple[str, ...]:
    if not added:
        return ()
    shapes = " and ".join("{} x {}".format(*graph.weight(op).shape) for op in added)
    weights = sum(graph.weight(op).numel() for op in added)
    heads = {op.weight: op for op in graph.ops if op.kind is Kind.LINEAR}
    table = next((op for op in graph.ops if op.kind is Kind.EMBEDDING and op.weight in heads), None)
    if table is None:
        return (f"a norm writes the stream: {shapes} behind it ({weights} weights)",)
    size = "{} x {}".format(*graph.weight(table).shape)
    untied = graph.weight(table).numel()
    return (
        f"the head stays tied to the embedding: one table of {size}, and {shapes} beside it ({weights} weights; a head "
        f"of its own would have {untied})",
    )
