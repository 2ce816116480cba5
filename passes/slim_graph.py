"""Slim a graph: cut its residual stream in one basis, its FFNs in a sweep, every map inserted and folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dotresize_fx.cost import block_linears, count_cost, weights_per_unit
from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.options import Options
from dotresize_fx.passes.find_heads import QK_NORM
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.fold_linears import FoldLinears
from dotresize_fx.passes.follow_heads import ALL_HEADS_NORM
from dotresize_fx.passes.insert_maps import InsertMaps
from dotresize_fx.passes.open_stream import open_stream
from dotresize_fx.progress import Progress
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import ATTENTION_KINDS, MatchReport, Region, RegionKind
from dotresize_fx.solvers import solver
from dotresize_fx.stream import stream_statistics
from dotresize_fx.sweep import Sweep, SweptRegion
from dotresize_fx.width_plan import plan_widths


def slim_graph(
    dense: FxGraph,
    matches: MatchReport,
    batches: Sequence[Mapping[str, torch.Tensor]],
    options: Options,
    progress: Progress,
    work: Path | None,
) -> tuple[FxGraph, tuple[SweptRegion, ...], tuple[str, ...]]:
    """A slim copy of ``dense``, what was cut, and notes for the report; ``work`` takes finished blocks.

    The stream is cut first, if asked, then the FFNs, so that they repair what the stream lost.

    Raises:
        NothingToSlimError: no region of the chosen kinds can be cut, or not by that much.
    """
    slimmed = dense.copy()
    if options.ratio == 0:
        return slimmed, (), ("ratio 0: nothing was cut",)
    total = _block_weights(dense)
    swept: list[SweptRegion] = []
    notes: tuple[str, ...] = ()
    basis = None
    if "residual" in options.regions:
        share = options.ratio if options.regions == ("residual",) else options.ratio / 2
        cut, basis, notes = _cut_stream(slimmed, matches, batches, total, share, options, progress)
        swept.append(cut)
    if "ffn" in options.regions:
        left = _block_weights(slimmed)
        ratio = max(0.0, 1 - (1 - options.ratio) * total / left)
        regions, beside = _ffns(slimmed)
        notes += beside
        units = {r.name: weights_per_unit(slimmed, r) for r in regions}
        widths = plan_widths(regions, units, left, ratio, multiple=options.multiple)
        sweep = Sweep(
            dense,
            slimmed,
            batches,
            lambda region, found: _apply(slimmed, region, found, options.check),
            refit=options.method != "magnitude",
            basis=basis,
        )
        with progress.stage("sweep", len(regions)) as step:
            for region in regions:
                swept.append(sweep.slim_region(region, widths[region.name], solver(options.method)))
                _write_block(slimmed, region, work)
                step()
    slimmed.refresh_shapes()
    return slimmed, tuple(swept), notes


def _ffns(graph: FxGraph) -> tuple[list[Region], tuple[str, ...]]:
    """The FFNs that the sweep can take one after another, in graph order, and what was left for that reason."""
    found = list(find_regions(graph).of_kind(RegionKind.FFN))
    reasons = {region.name: why_not_cut(graph, region) for region in found}
    if found and all(reasons.values()):
        why = "; ".join(sorted(set(reasons.values())))
        raise NothingToSlimError(f"none of the {len(found)} FFN widths found can be cut: {why}")
    chosen: list[Region] = []
    beside: list[str] = []
    reached = -1
    for region in (region for region in found if not reasons[region.name]):
        if graph.positions[region.writers[0]] > reached:
            chosen.append(region)
            reached = graph.positions[region.target]
        else:
            beside.append(f"{region.name}: left alone, it runs beside {chosen[-1].name} and adds to the same sum")
    return chosen, tuple(beside)


def _block_weights(graph: FxGraph) -> int:
    return count_cost(graph, 1).block_linear_weights


def why_not_cut(graph: FxGraph, region: Region) -> str:
    """Why a matched region is left alone all the same; empty when it can be cut."""
    if region.kind is RegionKind.PLAIN:
        return "nothing but linear ops between: cutting its rank is not supported yet"
    if region.kind in ATTENTION_KINDS:
        return "the widths of attention heads are found, and cannot be cut yet"
    if region.kind is RegionKind.RESIDUAL:
        return _why_not_opened(graph, region)
    ops = [graph.op(name) for name in (*region.writers, *region.readers)]
    if any(len(graph.users(op.weight)) > 1 for op in ops if op.weight is not None):
        return "its weights are shared by several layers, which is not supported yet"
    if any(graph.op(name).attributes.get("reshape") for name in region.crossed):
        return "a reshape that names its width stands inside, which is not supported yet"
    blocks = {op.name for op in block_linears(graph)}
    if not {op.name for op in ops} <= blocks:
        return "it is not part of a block"
    return "" if len(region.readers) == 1 else f"it has {len(region.readers)} readers, one is supported yet"


def _why_not_opened(graph: FxGraph, region: Region) -> str:
    """Why a stream's layer norms cannot become RMSNorms; empty when they can, or when there are none."""
    kinds = {graph.op(name).kind for name in region.norms}
    if Kind.LAYER_NORM not in kinds:
        return ""
    if len(kinds) > 1:
        return "layer norms and RMSNorms act on one stream"
    bare = set(region.readers) - set(region.normed_readers)
    return f"{min(bare)} reads it without a norm, and would miss its mean" if bare else ""


def _cut_stream(
    graph: FxGraph,
    matches: MatchReport,
    batches: Sequence[Mapping[str, torch.Tensor]],
    total: int,
    ratio: float,
    options: Options,
    progress: Progress,
) -> tuple[SweptRegion, torch.Tensor, tuple[str, ...]]:
    """One basis for the whole stream; returns the cut, notes for the report, and the (d, k) matrix that takes the
    dense model's stream, mean and all, into the slim one's coordinates.
    """
    streams = [r for r in matches.of_kind(RegionKind.RESIDUAL) if not why_not_cut(graph, r)]
    if not streams:
        reasons = {row.writes_reason for row in matches.linears if "norm" in row.writes_reason}
        reasons = {reason for reason in reasons if not any(norm in reason for norm in (QK_NORM, ALL_HEADS_NORM))}
        reasons |= {why_not_cut(graph, region) for region in matches.of_kind(RegionKind.RESIDUAL)}
        why = min(reasons, default="no width that norms and blocks share was found")
        raise NothingToSlimError(f"the residual stream cannot be cut: {why}; use --regions ffn")
    stream = max(streams, key=lambda r: len(r.readers))
    width = plan_widths(
        [stream], {stream.name: weights_per_unit(graph, stream)}, total, ratio, multiple=options.multiple
    )[stream.name]
    centred = any(graph.op(name).kind is Kind.LAYER_NORM for name in stream.norms)
    known = {op.name for op in graph.ops}
    stream, _ = open_stream(graph, stream)
    with progress.stage("stream statistics", len(batches)) as step:
        statistics = stream_statistics(graph, stream, batches, step)
    found = solver(options.method)(stream, statistics, width)
    _apply(graph, stream, found, options.check)
    basis = found.down - found.down.mean(0) if centred else found.down
    return SweptRegion(stream, width, None, found.notes), basis, _price_of_ties(graph, known)


def _price_of_ties(graph: FxGraph, known: set[str]) -> tuple[str, ...]:
    """What it took to keep a head tied to its table: the linears that opening the stream put in, ``known`` aside."""
    added = [op for op in graph.ops if op.kind is Kind.LINEAR and op.name not in known]
    if not added:
        return ()
    shapes = " and ".join("{} x {}".format(*graph.weight(op).shape) for op in added)
    weights = sum(graph.weight(op).numel() for op in added)
    heads = {op.weight: op for op in graph.ops if op.kind is Kind.LINEAR}
    table = next(op for op in graph.ops if op.kind is Kind.EMBEDDING and op.weight in heads)
    size = "{} x {}".format(*graph.weight(table).shape)
    return (f"the head stays tied to the embedding: one table of {size}, and {shapes} beside it ({weights} weights)",)


def _apply(graph: FxGraph, region: Region, found: RegionMap, check: bool) -> None:
    insert = InsertMaps(region, found)
    insert(graph, check=check)
    FoldLinears(insert.downs, insert.ups)(graph, check=check)


def _write_block(graph: FxGraph, region: Region, work: Path | None) -> None:
    """Put a finished region's weights into the work folder."""
    if work is None:
        return
    from safetensors.torch import save_file

    folder = work / "blocks"
    folder.mkdir(exist_ok=True)
    ops = [graph.op(name) for name in (*region.writers, *region.readers)]
    values = {value for op in ops for value in (op.weight, op.bias) if value is not None}
    tensors: dict[str, torch.Tensor] = {
        graph.parameter_name(v): graph.parameter(v).detach().contiguous() for v in values
    }
    save_file(tensors, folder / f"{region.name}.safetensors")
