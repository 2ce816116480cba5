"""Slim a graph that exists only as ONNX: widths planned and regions swept in ONNX Runtime, maps inserted and folded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from dotresize_fx.cost import CostModel
from dotresize_fx.depth.gone_block import GoneBlock
from dotresize_fx.errors import UsageError
from dotresize_fx.graph import Kind
from dotresize_fx.least_squares import ENCODER_PULL, PULL
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.onnx_form.one_shot import OneShotSweep
from dotresize_fx.onnx_form.sensitivity import measure_onnx_curves
from dotresize_fx.onnx_form.stream_room import stream_room
from dotresize_fx.onnx_form.sweep import OnnxSweep
from dotresize_fx.options import Options
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.check_folded import check_folded, mapped_ends
from dotresize_fx.passes.choose_regions import SWEPT, choose_regions, sublayers
from dotresize_fx.passes.cut_stream import apply_map
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.follow_plan import check_plan, follow_plan
from dotresize_fx.passes.plan_widths import plan_widths
from dotresize_fx.passes.slim_graph import too_few_tokens, what_was_refused, what_went
from dotresize_fx.passes.sweep_regions import cut_or_refitted
from dotresize_fx.plan_table import plan_table
from dotresize_fx.progress import Progress
from dotresize_fx.rank.low_rank_linear import LowRankLinear
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import MatchReport, Region, RegionKind
from dotresize_fx.solvers import solvers_for
from dotresize_fx.sweep import SweptRegion
from dotresize_fx.task import predicts_tokens
from dotresize_fx.width_plan import WidthPlan

Inputs = Mapping[str, torch.Tensor]
REWRITTEN = "what is cut is spelled in parts of other ops: these were rewritten, exactly, to be cut"


@dataclass(frozen=True)
class OnnxGraphs:
    """``given`` is the file's graph and stays as it is; ``canonical`` a rewritten copy, in which regions were found."""

    given: OnnxGraph
    canonical: OnnxGraph
    matches: MatchReport


@dataclass(frozen=True)
class SlimmedOnnx:
    """A slim graph, the dense one that was edited into it, what was cut, and notes for the report.

    ``untouched`` says that the dense one is the file's own, of which nothing beside the cut was rewritten. ``pairs``:
    by region which rotary pairs are left, see :class:`RegionMap`. ``factorized`` are the linears that are two now,
    ``gone`` the blocks that went, ``gone_caches`` the dense graph's inputs and outputs that did.
    """

    graph: OnnxGraph
    dense: OnnxGraph
    untouched: bool
    swept: tuple[SweptRegion, ...] = ()
    plan: WidthPlan = field(default_factory=lambda: WidthPlan({}))
    notes: tuple[str, ...] = ()
    pairs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    factorized: tuple[LowRankLinear, ...] = ()
    gone: tuple[GoneBlock, ...] = ()
    gone_caches: frozenset[str] = frozenset()


def slim_onnx_graph(
    graphs: OnnxGraphs,
    batches: Sequence[Inputs],
    options: Options,
    progress: Progress,
    *,
    task: str,
    rows: Callable[[Inputs], int],
    plan: WidthPlan | None = None,
    device: str = "cpu",
    streams: int | None = None,
) -> SlimmedOnnx:
    """A slim copy; ``plan`` gives the widths instead of the ratio. ``rows``: how many rows a batch makes, about.
    ``streams``: how many activation streams the sweep keeps, 2, 1 or 0; None: as many as fit, see :func:`stream_room`.

    Raises:
        NothingToSlimError: nothing can be cut, or not by that much.
        SolverError: activations are infinite or NaN.
        UsageError: the plan is for another model, or the residual stream is asked for.
        VerificationError: what was folded is not what was solved for.
    """
    if options.ratio == 0 and plan is None:
        return SlimmedOnnx(graphs.given.copy(), graphs.given, True, notes=("ratio 0: nothing was cut",))
    matches, canonical = graphs.matches, graphs.canonical
    if plan is not None:
        check_plan(plan, matches, options.method)
    _refuse_stream(options, plan, matches)
    length = attended_length(canonical, batches[0])
    cost = CostModel(options.cost or "weights", options.sequence_length if task == "encoder" else length)
    total = cost.total(canonical)
    regions, notes = choose_regions(canonical, matches.regions, SWEPT if plan else options.kinds)
    notes += too_few_tokens(rows, regions, batches, task)
    if plan is not None:
        regions = [region for region in regions if region.name in plan.widths]
        chosen = follow_plan(plan, canonical, matches.regions, regions)
    else:
        curves: Mapping[str, torch.Tensor] = {}
        if options.allocation != "uniform" and regions:
            own_biases(probed := canonical.copy(), regions)
            with progress.stage("measure sensitivity", len(regions)) as step:
                curves = measure_onnx_curves(
                    probed, regions, batches, task=task, rows=rows, device=device, advanced=step
                )
        chosen, kept = plan_widths(canonical, regions, batches, total, cost, options, progress, task, curves)
        notes += what_was_refused(matches, options.kinds) + kept
    progress.show(plan_table(regions, chosen.widths))
    dense, found = _editable(graphs, _swept(regions, chosen))
    regions = [found.get(region.name, region) for region in regions]
    untouched = dense is graphs.given
    if not untouched:
        notes += (REWRITTEN,)
    slimmed = dense.copy()
    cut = _swept(regions, chosen)
    own_biases(slimmed, cut)
    if streams is None and cut:
        room = stream_room(dense, cut[len(cut) // 2].target, batches, options.memory, device)
        streams, notes = room.streams, (*notes, *room.notes)
    swept, pairs = _sweep(
        dense, slimmed, regions, chosen, batches, options, progress, task, device, 2 if streams is None else streams
    )
    slimmed.refresh_shapes()
    if plan is None and options.ratio is not None:
        notes += what_went(cost, options, 1 - cost.total(slimmed) / total)
    return SlimmedOnnx(slimmed, dense, untouched, tuple(swept), chosen, notes, pairs)


def attended_length(graph: OnnxGraph, inputs: Inputs) -> int:
    """How many keys a query attends to on these inputs: what the graph says, else the size behind the batch."""
    keys = [op.inputs[1].shape[-2:-1] for op in graph.ops if op.kind is Kind.ATTENTION and len(op.inputs) > 1]
    stated = [size for sizes in keys for size in sizes if isinstance(size, int)]
    value = next(iter(inputs.values()))
    return max(stated) if stated else value.shape[1] if value.ndim > 1 else 1


def own_biases(graph: OnnxGraph, regions: Sequence[Region]) -> None:
    """Give each writer a bias of its own where several have one constant: what stands in for one stands in for all."""
    for op in (graph.op(name) for region in regions for name in region.writers):
        bias = graph.bias(op)
        if op.bias is not None and bias is not None and len(graph.users(op.bias)) > 1:
            graph.set_bias(op, bias)


def _refuse_stream(options: Options, plan: WidthPlan | None, matches: MatchReport) -> None:
    streams = {region.name for region in matches.of_kind(RegionKind.RESIDUAL)}
    if plan is None and RegionKind.RESIDUAL in options.kinds and options.regions:
        raise UsageError("--regions residual: the residual stream of an ONNX file is not cut yet: use ffn")
    if plan is not None and streams & plan.widths.keys():
        raise UsageError("--plan cuts the residual stream, which is not cut yet in an ONNX file: leave it out")


def _swept(regions: Sequence[Region], plan: WidthPlan) -> list[Region]:
    """Those that the sweep changes."""
    groups = sublayers(regions)
    cuts = [[(region, plan.widths[region.name]) for region in together] for together in groups]
    return [region for together in cuts for region, _ in cut_or_refitted(together, stream_cut=False)]


def _editable(graphs: OnnxGraphs, regions: Sequence[Region]) -> tuple[OnnxGraph, dict[str, Region]]:
    """The graph to cut them in, and by name as it has them: the least rewritten one in which all of them are found.

    That is the file's own where neither linears are packed nor heads spelled in other ways.
    """
    for attempt in attempts(graphs):
        found = {ends(region): region for region in find_regions(attempt).regions}
        if all(ends(region) in found for region in regions):
            return attempt, {region.name: found[ends(region)] for region in regions}
    return graphs.canonical, {region.name: region for region in regions}


def attempts(graphs: OnnxGraphs) -> Iterator[OnnxGraph]:
    """The file's own graph, and one with all rewritten but its norms."""
    yield graphs.given
    parted = graphs.given.copy()
    canonicalise(parted, check=False, norms=False)
    yield parted


def ends(region: Region) -> tuple[object, ...]:
    """What makes a region the same one in two graphs."""
    return region.name, region.kind, region.width, region.writers, region.readers, region.attention, region.target


def _sweep(
    dense: OnnxGraph,
    slimmed: OnnxGraph,
    regions: Sequence[Region],
    plan: WidthPlan,
    batches: Sequence[Inputs],
    options: Options,
    progress: Progress,
    task: str,
    device: str,
    streams: int,
) -> tuple[list[SweptRegion], dict[str, torch.Tensor]]:
    pairs: dict[str, torch.Tensor] = {}

    def apply(region: Region, found: RegionMap) -> None:
        mapped = mapped_ends(slimmed, region, found)
        apply_map(slimmed, region, found, options.check)
        check_folded(slimmed, region, mapped)
        if found.pairs is not None:
            pairs[region.name] = found.pairs.cpu()

    sweeping = OnnxSweep if streams == 2 else partial(OneShotSweep, held=streams == 1)
    sweep = sweeping(
        dense,
        slimmed,
        batches,
        apply,
        refit=options.method != "magnitude",
        pull=PULL if predicts_tokens(task) else ENCODER_PULL,
        causal=predicts_tokens(task),
        device=device,
    )
    swept: list[SweptRegion] = []
    with progress.stage("sweep", len(regions)) as step:
        for together in sublayers(regions):
            cuts = [(region, plan.widths[region.name]) for region in together]
            if chosen := cut_or_refitted(cuts, stream_cut=False):
                swept += sweep.slim_sublayer(chosen, lambda region: solvers_for(options.method, region.kind))
            for _ in together:
                step()
    return swept, pairs
