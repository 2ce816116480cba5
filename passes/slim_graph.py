"""Slim a graph: its residual stream in one basis, its FFNs and attention heads in a sweep, all inserted and folded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from dotresize_fx.clock import Clock
from dotresize_fx.cost import CostModel, one_stream
from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.journal import Journal
from dotresize_fx.options import Options
from dotresize_fx.passes.choose_regions import REFITTED, SWEPT, choose_regions, left_alone
from dotresize_fx.passes.cut_stream import cut_stream, cuttable_streams
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.follow_plan import check_plan, follow_plan
from dotresize_fx.passes.insert_adapters import InsertPostNormAdapters, post_norms
from dotresize_fx.passes.mix_graph import mix_graph
from dotresize_fx.passes.plan_widths import plan_widths
from dotresize_fx.passes.reduce_graph import reduce_graph
from dotresize_fx.passes.sweep_regions import Slimmed, sweep_regions
from dotresize_fx.plan_table import plan_table
from dotresize_fx.progress import Progress
from dotresize_fx.ranks import Ranks
from dotresize_fx.regions import ATTENTION_KINDS, MatchReport, Region, RegionKind
from dotresize_fx.slim_stream import SlimStream
from dotresize_fx.structure_options import changes_structure
from dotresize_fx.sweep import SweptRegion
from dotresize_fx.task import reads_text
from dotresize_fx.width_plan import WidthPlan

# A share that went and differs by more from the one asked for is worth a note.
ASTRAY = 0.02


def slim_graph(
    dense: FxGraph,
    matches: MatchReport,
    batches: Sequence[Mapping[str, torch.Tensor]],
    options: Options,
    progress: Progress,
    journal: Journal | None = None,
    *,
    task: str = "decoder",
    plan: WidthPlan | None = None,
    curves: Mapping[str, torch.Tensor] | None = None,
    refit: bool | None = None,
    factors: Mapping[str, int] | None = None,
    clock: Clock | None = None,
    ranks: Ranks | None = None,
) -> Slimmed:
    """A slim copy of ``dense``. ``plan`` gives the widths instead of the ratio.

    ``journal`` takes the width plan and finished sublayers; what it has of an earlier run is not computed again.

    ``curves``, if given, are what ``measure_curves`` said of the same graph and batches: one measurement serves
    several ratios. ``factors`` are, by kind, what planned widths must be multiples of.
    ``clock`` is what widths take, where they are planned by that. ``ranks`` share the batches
    (not where the options are not ``helped``).

    ``refit``: whether readers are refitted; None says so of every method but the baseline ``magnitude``.

    The stream is cut first, if asked, then the rest, so that it repairs what the stream lost.

    Raises:
        NothingToSlimError: no region of the chosen kinds can be cut, or not by that much.
        UsageError: the plan is for another model.
        TargetLatencyError: no plan meets the clock's target.
    """
    slimmed = dense.copy()
    if options.ratio == 0 and plan is None:
        return Slimmed(slimmed, notes=("ratio 0: nothing was cut",))
    if changes_structure(options):  # no width is planned
        reduced = reduce_graph(dense, batches, options, progress, task)
        return Slimmed(reduced.graph, notes=reduced.notes, gone=reduced.gone, factorized=reduced.factorized)
    length = dense.attended_length
    if reads_text(task):  # an encoder's batches are as long as their paragraphs
        length = options.sequence_length if task == "encoder" else next(iter(batches[0].values())).shape[1]
    cost = CostModel(options.cost or "weights", length)
    total = cost.total(dense)
    if options.methods:
        mixed = mix_graph(dense, matches, batches, options, progress, task, cost)
        return replace(mixed, notes=(*mixed.notes, *what_went(cost, options, 1 - cost.total(mixed.graph) / total)))
    cuts_stream = RegionKind.RESIDUAL in options.kinds if plan is None else "residual stream" in plan.widths
    matches = _with_parted_stream(slimmed, matches, options, cuts_stream)
    if plan is not None:
        check_plan(plan, matches, options.method)
    refit = options.method != "magnitude" if refit is None else refit
    swept: list[SweptRegion] = []
    notes: tuple[str, ...] = ()
    stream: SlimStream | None = None
    widths: dict[str, int] = {}
    kinds = options.kinds
    streams = [region.name for region in matches.of_kind(RegionKind.RESIDUAL)]
    asked = next((plan.widths[name] for name in streams if name in plan.widths), None) if plan else None
    if asked is not None if plan else RegionKind.RESIDUAL in kinds:
        share = (options.ratio or 0) / (1 if len(kinds) == 1 else 2)
        factor = (factors or {}).get(RegionKind.RESIDUAL, 1)
        cut = cut_stream(slimmed, matches, batches, cost, share, options, progress, asked, factor)
        stream, notes = cut.stream, cut.notes
        swept.append(cut.swept)
        widths[cut.swept.region.name] = cut.swept.width
    rest = tuple(kind for kind in kinds if kind is not RegionKind.RESIDUAL)
    found = find_regions(slimmed).regions
    if rest or plan:
        regions, beside = choose_regions(slimmed, found, SWEPT if plan else rest)
        notes += beside + too_few_tokens(dense.expected_rows, regions, batches, task)
    else:
        regions = _refitted_alone(slimmed, found) if refit or options.effort != "fast" else []
    planned = regions if rest or plan else []
    if plan is not None:
        # What it does not name was not planned, and is not refitted either: a run's plan gives that run again.
        regions = [region for region in regions if region.name in plan.widths]
        chosen = follow_plan(plan, slimmed, found, regions)
    elif rest:
        found_before = journal.plan() if journal is not None else None
        if found_before is None and dense.spool is not None and reads_text(task):
            dense.spool.expect_activations([one_stream(dense, one["input_ids"].numel()) for one in batches])
        chosen, kept = found_before or plan_widths(
            slimmed, regions, batches, total, cost, options, progress, task, curves, factors, clock, ranks
        )
        if journal is not None and found_before is None:
            journal.write_plan(chosen, kept)
        notes += what_was_refused(matches, kinds) + kept
    else:
        chosen = WidthPlan({region.name: region.width for region in regions})
    widths |= chosen.widths
    progress.show(plan_table([*matches.of_kind(RegionKind.RESIDUAL), *planned], widths))
    if regions:
        swept += sweep_regions(
            *(dense, slimmed, regions, chosen, batches, options, progress, task, refit, journal, stream), ranks=ranks
        )
    slimmed.refresh_shapes()
    if plan is None and options.ratio is not None:
        notes += what_went(cost, options, 1 - cost.total(slimmed) / total)
    return Slimmed(slimmed, tuple(swept), WidthPlan(widths, chosen.losses), notes)


def _with_parted_stream(graph: FxGraph, matches: MatchReport, options: Options, asked: bool) -> MatchReport:
    """Where a post-norm stream is to be cut, one basis a sublayer, it is parted first: its regions are found then."""
    if not asked or options.basis != "sublayer" or cuttable_streams(graph, matches) or not post_norms(graph):
        return matches
    InsertPostNormAdapters()(graph, check=options.check)
    return find_regions(graph)


def _refitted_alone(graph: FxGraph, found: Sequence[Region]) -> list[Region]:
    """Where the stream alone is cut: regions that keep their widths and have readers to refit."""
    try:
        return choose_regions(graph, found, REFITTED)[0]
    except NothingToSlimError:
        return []


def what_was_refused(matches: MatchReport, kinds: Sequence[RegionKind]) -> tuple[str, ...]:
    """Why heads that were asked for have no region at all."""
    asked = any(kind in ATTENTION_KINDS for kind in kinds)
    return tuple(left_alone(why for _, why in matches.refused)) if asked else ()


def what_went(cost: CostModel, options: Options, went: float) -> tuple[str, ...]:
    """Of another cost than weights always, of any where it is not about what was asked for."""
    asked = options.ratio or 0.0
    why = "" if options.basis == "shared" else ", and adapters between bases count"
    notes: tuple[str, ...] = (
        () if cost.kind == "weights" else (f"the ratio is of the {cost.name}: {went:.1%} of them went",)
    )
    if abs(went - asked) > ASTRAY:
        notes += (
            f"--ratio asked for {asked:.1%} of the {cost.name} and {went:.1%} went: widths go in steps, "
            f"which --multiple can make finer{why}",
        )
    return notes


def too_few_tokens(
    rows: Callable[[Mapping[str, torch.Tensor]], int],
    regions: Sequence[Region],
    batches: Sequence[Mapping[str, torch.Tensor]],
    task: str,
) -> tuple[str, ...]:
    """A note where the widest region has more neurons than there are tokens, or else ``rows`` of the batches."""
    widest = max((region.width for region in regions), default=0)
    masks = [batch.get("attention_mask") for batch in batches]
    if reads_text(task):
        tokens = sum(int(mask.count_nonzero()) for mask in masks if mask is not None)
        unit, more = "tokens", " with --calibration-tokens"
    else:
        tokens, unit, more = sum(map(rows, batches)), "rows", ""
    if tokens >= widest or (reads_text(task) and any(mask is None for mask in masks)):
        return ()
    return (
        f"{tokens} calibration {unit} say too little of a width of {widest}: its Gram matrix is singular and was "
        f"regularised; give more{more}",
    )
