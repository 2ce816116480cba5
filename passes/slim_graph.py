"""Slim a graph: its residual stream in one basis, its FFNs and attention heads in a sweep, all inserted and folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dotresize_fx.cost import CostModel
from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.least_squares import ENCODER_PULL, PULL
from dotresize_fx.options import Options
from dotresize_fx.passes.choose_regions import SWEPT, choose_regions, left_alone, sublayers
from dotresize_fx.passes.cut_stream import apply_map, cut_stream
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.follow_plan import check_plan, follow_plan
from dotresize_fx.passes.plan_widths import plan_widths
from dotresize_fx.plan_table import plan_table
from dotresize_fx.progress import Progress
from dotresize_fx.regions import ATTENTION_KINDS, MatchReport, Region, RegionKind
from dotresize_fx.repair import ENCODER_LEARNING_RATE
from dotresize_fx.solvers import solvers_for
from dotresize_fx.sweep import Sweep, SweptRegion
from dotresize_fx.width_plan import WidthPlan


@dataclass(frozen=True)
class Slimmed:
    """A slim graph, what was cut in it and by which width plan, and notes for the report."""

    graph: FxGraph
    swept: tuple[SweptRegion, ...] = ()
    plan: WidthPlan = field(default_factory=lambda: WidthPlan({}))
    notes: tuple[str, ...] = ()


def slim_graph(
    dense: FxGraph,
    matches: MatchReport,
    batches: Sequence[Mapping[str, torch.Tensor]],
    options: Options,
    progress: Progress,
    work: Path | None = None,
    *,
    task: str = "decoder",
    plan: WidthPlan | None = None,
    curves: Mapping[str, torch.Tensor] | None = None,
    factors: Mapping[str, int] | None = None,
) -> Slimmed:
    """A slim copy of ``dense``; ``work`` takes finished blocks. ``plan`` gives the widths instead of the ratio.

    ``curves``, if given, are what ``measure_curves`` said of the same graph and batches: one measurement serves
    several ratios. ``factors`` are, by kind, what planned widths must be multiples of.

    The stream is cut first, if asked, then the rest, so that it repairs what the stream lost.

    Raises:
        NothingToSlimError: no region of the chosen kinds can be cut, or not by that much.
        UsageError: the plan is for another model.
    """
    slimmed = dense.copy()
    if options.ratio == 0 and plan is None:
        return Slimmed(slimmed, notes=("ratio 0: nothing was cut",))
    if plan is not None:
        check_plan(plan, matches, options.method)
    cost = CostModel(options.cost or "weights", _length(batches))
    total = cost.total(dense)
    swept: list[SweptRegion] = []
    notes: tuple[str, ...] = ()
    basis = None
    widths: dict[str, int] = {}
    kinds = options.kinds
    streams = [region.name for region in matches.of_kind(RegionKind.RESIDUAL)]
    asked = next((plan.widths[name] for name in streams if name in plan.widths), None) if plan else None
    if asked is not None if plan else RegionKind.RESIDUAL in kinds:
        share = (options.ratio or 0) / (1 if len(kinds) == 1 else 2)
        factor = (factors or {}).get(RegionKind.RESIDUAL, 1)
        cut, basis, notes = cut_stream(slimmed, matches, batches, cost, share, options, progress, asked, factor)
        swept.append(cut)
        widths[cut.region.name] = cut.width
    rest = tuple(kind for kind in kinds if kind is not RegionKind.RESIDUAL)
    found = find_regions(slimmed).regions
    if rest or plan:
        regions, beside = choose_regions(slimmed, found, SWEPT if plan else rest)
        notes += beside + _too_few_tokens(regions, batches)
    else:
        regions = _refitted_alone(slimmed, found, options.method)
    if plan is not None:
        # What it does not name was not planned, and is not refitted either: a run's plan gives that run again.
        regions = [region for region in regions if region.name in plan.widths]
        chosen = follow_plan(plan, slimmed, found, regions)
    elif rest:
        chosen, kept = plan_widths(slimmed, regions, batches, total, cost, options, progress, task, curves, factors)
        notes += _what_was_refused(matches, kinds) + kept
    else:
        chosen = WidthPlan({region.name: region.width for region in regions})
    widths |= chosen.widths
    planned = regions if rest or plan else []
    progress.show(plan_table([*matches.of_kind(RegionKind.RESIDUAL), *planned], widths))
    if regions:
        swept += _sweep(dense, slimmed, regions, chosen, batches, options, progress, work, basis, task)
    slimmed.refresh_shapes()
    if plan is None and cost.kind != "weights":
        notes += (f"the ratio is of the {cost.name}: {1 - cost.total(slimmed) / total:.1%} of them went",)
    return Slimmed(slimmed, tuple(swept), WidthPlan(widths, chosen.losses), notes)


def _sweep(
    dense: FxGraph,
    slimmed: FxGraph,
    regions: list[Region],
    plan: WidthPlan,
    batches: Sequence[Mapping[str, torch.Tensor]],
    options: Options,
    progress: Progress,
    work: Path | None,
    basis: torch.Tensor | None,
    task: str,
) -> list[SweptRegion]:
    sweep = Sweep(
        dense,
        slimmed,
        batches,
        lambda region, found: apply_map(slimmed, region, found, options.check),
        refit=options.method != "magnitude",
        basis=basis,
        repair_steps=0 if options.effort == "fast" else options.steps_that_repair(task),
        repair_rate=ENCODER_LEARNING_RATE if task == "encoder" else None,
        pull=ENCODER_PULL if task == "encoder" else PULL,
        seed=options.seed,
    )
    swept: list[SweptRegion] = []
    with progress.stage("sweep", len(regions)) as step:
        for together in sublayers(regions):
            cuts = [(region, plan.widths[region.name]) for region in together]
            if chosen := _cut_or_refitted(cuts, stream_cut=basis is not None):
                swept += sweep.slim_sublayer(chosen, lambda region: solvers_for(options.method, region.kind))
                for region, _ in chosen:
                    _write_block(slimmed, region, work)
            for _ in together:
                step()
    return swept


def _cut_or_refitted(cuts: Sequence[tuple[Region, int]], *, stream_cut: bool) -> list[tuple[Region, int]]:
    """Those of a sublayer that are cut; and where scores or the stream were, the full widths whose reader is refitted.

    Where whole heads go, their cut refits the reader of the values, whose own region is then another.
    """
    cut = [region for region, width in cuts if width < region.width]
    scores = any(region.kind is RegionKind.QUERY_KEY for region in cut)
    again = (RegionKind.VALUE, RegionKind.FFN) if stream_cut else (RegionKind.VALUE,) if scores else ()
    fewer = [region.attention for region in cut if region.kind is RegionKind.HEADS]
    return [(r, w) for r, w in cuts if w < r.width or (r.kind in again and r.attention not in fewer)]


def _refitted_alone(graph: FxGraph, found: Sequence[Region], method: str) -> list[Region]:
    """Where the stream alone is cut: regions that keep their widths and have readers to refit."""
    if method == "magnitude":
        return []
    try:
        return choose_regions(graph, found, (RegionKind.VALUE, RegionKind.FFN))[0]
    except NothingToSlimError:
        return []


def _what_was_refused(matches: MatchReport, kinds: Sequence[RegionKind]) -> tuple[str, ...]:
    """Why heads that were asked for have no region at all."""
    asked = any(kind in ATTENTION_KINDS for kind in kinds)
    return tuple(left_alone(why for _, why in matches.refused)) if asked else ()


def _too_few_tokens(regions: Sequence[Region], batches: Sequence[Mapping[str, torch.Tensor]]) -> tuple[str, ...]:
    widest = max((region.width for region in regions), default=0)
    masks = [batch.get("attention_mask") for batch in batches]
    tokens = sum(int(mask.count_nonzero()) for mask in masks if mask is not None)
    if tokens >= widest or any(mask is None for mask in masks):
        return ()
    return (
        f"{tokens} calibration tokens say too little of a width of {widest}: its Gram matrix is singular and was "
        "regularised; give more with --calibration-tokens",
    )


def _length(batches: Sequence[Mapping[str, torch.Tensor]]) -> int:
    """Of the calibration's sequences, in tokens."""
    return next(iter(batches[0].values())).shape[1]


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
