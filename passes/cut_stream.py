"""Cut the residual stream of a graph in one basis for all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dotresize_fx.cost import CostModel
from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.options import Options
from dotresize_fx.passes.choose_regions import why_not_cut
from dotresize_fx.passes.find_heads import QK_NORM
from dotresize_fx.passes.fold_linears import FoldLinears
from dotresize_fx.passes.follow_heads import ALL_HEADS_NORM
from dotresize_fx.passes.insert_maps import InsertMaps
from dotresize_fx.passes.open_stream import open_stream
from dotresize_fx.progress import Progress
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import MatchReport, Region, RegionKind
from dotresize_fx.solvers import solvers_for
from dotresize_fx.stream import stream_statistics
from dotresize_fx.sweep import SweptRegion
from dotresize_fx.width_plan import plan_uniformly, step_of


def apply_map(graph: FxGraph, region: Region, found: RegionMap, check: bool) -> None:
    """Insert a map and fold it."""
    insert = InsertMaps(region, found)
    insert(graph, check=check)
    FoldLinears(insert.downs, insert.ups)(graph, check=check)


def widest_stream(graph: FxGraph, matches: MatchReport) -> Region:
    """The stream that most linears read.

    Raises:
        NothingToSlimError: there is none that can be cut; the message says why.
    """
    streams = [r for r in matches.of_kind(RegionKind.RESIDUAL) if not why_not_cut(graph, r)]
    if not streams:
        reasons = {row.writes_reason for row in matches.linears if "norm" in row.writes_reason}
        reasons = {reason for reason in reasons if not any(norm in reason for norm in (QK_NORM, ALL_HEADS_NORM))}
        reasons |= {why_not_cut(graph, region) for region in matches.of_kind(RegionKind.RESIDUAL)}
        why = min(reasons, default="no width that norms and blocks share was found")
        raise NothingToSlimError(f"the residual stream cannot be cut: {why}; use --regions ffn")
    return max(streams, key=lambda r: len(r.readers))


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
) -> tuple[SweptRegion, torch.Tensor, tuple[str, ...]]:
    """Cut it by ``ratio`` of what the graph costs, to a multiple of ``factor``, or to ``width``.

    Returns the cut, the (d, k) matrix that takes the dense model's stream, mean and all, into the slim one's
    coordinates, and notes for the report.
    """
    stream = widest_stream(graph, matches)
    if width is None:
        units = {stream.name: cost.per_unit(graph, stream)}
        steps = {stream.name: step_of(stream, options.multiple, factor)}
        plan = plan_uniformly([stream], units, cost.total(graph), ratio, steps=steps, cost=cost.name)
        width = plan.widths[stream.name]
    centred = any(graph.op(name).kind is Kind.LAYER_NORM for name in stream.norms)
    known = {op.name for op in graph.ops}
    stream, _ = open_stream(graph, stream)
    with progress.stage("stream statistics", len(batches)) as step:
        statistics = stream_statistics(graph, stream, batches, step)
    name, solver = solvers_for(options.method, stream.kind)[0]
    found = solver(stream, statistics, width)
    apply_map(graph, stream, found, options.check)
    basis = found.down - found.down.mean(0) if centred else found.down
    return SweptRegion(stream, width, name, None, found.notes), basis, _price_of_ties(graph, known)


def _price_of_ties(graph: FxGraph, known: set[str]) -> tuple[str, ...]:
    """What it took to keep a head tied to its table: the linears that opening the stream put in, ``known`` aside."""
    added = [op for op in graph.ops if op.kind is Kind.LINEAR and op.name not in known]
    if not added:
        return ()
    shapes = " and ".join("{} x {}".format(*graph.weight(op).shape) for op in added)
    weights = sum(graph.weight(op).numel() for op in added)
    heads = {op.weight: op for op in graph.ops if op.kind is Kind.LINEAR}
    table = next((op for op in graph.ops if op.kind is Kind.EMBEDDING and op.weight in heads), None)
    if table is None:
        return (f"a norm writes the stream: {shapes} behind it ({weights} weights)",)
    size = "{} x {}".format(*graph.weight(table).shape)
    return (f"the head stays tied to the embedding: one table of {size}, and {shapes} beside it ({weights} weights)",)
