"""Mixed plans for a whole graph: each method alone and all together, solved and measured, and the best of them kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from dotresize_fx.cost import CostModel
from dotresize_fx.depth.gone_block import gone_block
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.options import Options
from dotresize_fx.passes.choose_regions import REFITTED, choose_regions
from dotresize_fx.passes.drop_layers import DropLayers
from dotresize_fx.passes.factorize_graph import factorize_graph, low_rank_linears
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.plan_mixed import MixedPlan, Offers, check_reached
from dotresize_fx.passes.sweep_regions import Slimmed, sweep_regions
from dotresize_fx.plan_table import plan_table
from dotresize_fx.prices import price_graph
from dotresize_fx.progress import Progress
from dotresize_fx.rank.low_rank_linear import LowRankLinear
from dotresize_fx.regions import MatchReport, counted
from dotresize_fx.structure_table import depth_table, rank_table
from dotresize_fx.sweep import SweptRegion, is_held_out
from dotresize_fx.width_plan import WidthPlan


def mix_graph(
    dense: FxGraph,
    matches: MatchReport,
    batches: Sequence[Mapping[str, torch.Tensor]],
    options: Options,
    progress: Progress,
    task: str,
    cost: CostModel,
) -> Slimmed:
    """A copy of ``dense`` with ``options.ratio`` of the cost gone, by the options' methods (mixed/frontier.py).

    Losses of single cuts do not add up for all methods alike: what a method alone is measured to lose over what was
    predicted scales its losses in the plan of all. Measured is on the calibration text that nothing is solved with, or
    on all of it where it is too little to hold any out, which a note says.

    Raises:
        NothingToSlimError: there are no blocks, or the methods together cannot remove so much.
    """
    ratio, methods = options.ratio or 0.0, options.methods
    offers = Offers(dense, matches, batches, methods, cost, options, progress, task)
    held_out = [batch for i, batch in enumerate(batches) if is_held_out(i)]
    tried: list[tuple[str, MixedPlan, Slimmed, float]] = []

    def attempt(name: str, plan: MixedPlan | None) -> None:
        if plan is None or any(_same(plan, other) for _, other, _, _ in tried):
            return
        solved = carry_out(dense, offers, plan, batches, options, progress, task)
        with torch.no_grad(), progress.stage("measure plans"):
            tried.append((name, plan, solved, price_graph(dense, solved.graph, held_out or batches, task)))

    for method in methods:
        attempt(method, offers.plan(ratio, [method], {}))
    scales = {name: lost / plan.predicted for name, plan, _, lost in tried if plan.predicted > 0 and lost > 0}
    if len(methods) > 1 or not tried:
        attempt("all", check_reached(offers.plan(ratio, methods, scales), ratio, methods))
    name, plan, best, _ = min(tried, key=lambda one: one[3])
    _show(offers, plan, best, progress)
    notes = (*offers.notes, *_told(offers, plan), _compared(tried, name, bool(held_out)))
    return replace(best, notes=notes)


def carry_out(
    dense: FxGraph,
    offers: Offers,
    plan: MixedPlan,
    batches: Sequence[Mapping[str, torch.Tensor]],
    options: Options,
    progress: Progress,
    task: str,
) -> Slimmed:
    """Blocks go first, then ranks, then widths: what comes later makes good in the stream what went before."""
    slim = dense.copy()
    if plan.gone:
        DropLayers([offers.blocks[i] for i in plan.gone])(slim, check=options.check)
        slim.refresh_shapes()
    linears: tuple[LowRankLinear, ...] = ()
    if plan.ranks:
        found = factorize_graph(dense, batches, plan.ranks, progress, slim=slim, check=options.check)
        linears = low_rank_linears(dense, found)
    swept: list[SweptRegion] = []
    changed = bool(plan.gone or plan.ranks)
    own = {op.name for op in dense.ops} - {cut.op for cut in plan.ranks}
    there = [region for region in find_regions(slim).regions if own.issuperset((*region.writers, *region.readers))]
    kinds = {region.kind for region in offers.regions} | (set(REFITTED) if changed else set())
    regions, _ = choose_regions(slim, there, tuple(kinds))
    regions = [region for region in regions if region.name in plan.widths or (changed and region.kind in REFITTED)]
    widths = {region.name: plan.widths.get(region.name, region.width) for region in regions}
    if regions:
        refit = options.method != "magnitude"
        swept = sweep_regions(
            dense, slim, regions, WidthPlan(widths), batches, options, progress, task, refit, changed=changed
        )
    slim.refresh_shapes()
    gone = tuple(gone_block(dense, i, offers.blocks[i].ops) for i in plan.gone)
    return Slimmed(slim, tuple(swept), WidthPlan(widths), gone=gone, factorized=linears)


def _same(one: MixedPlan, other: MixedPlan) -> bool:
    return (one.widths, one.ranks, one.gone) == (other.widths, other.ranks, other.gone)


def _show(offers: Offers, plan: MixedPlan, found: Slimmed, progress: Progress) -> None:
    """What is planned, of each method that cuts; the widths of blocks that go are none."""
    gone = {name for block in found.gone for name in block.ops}
    if found.gone:
        progress.show(depth_table(found.gone))
    if found.factorized:
        progress.show(rank_table(found.factorized))
    left = [region for region in offers.regions if not gone.issuperset((*region.writers, *region.readers))]
    if left:
        progress.show(plan_table(left, {region.name: region.width for region in left} | dict(plan.widths)))


def _told(offers: Offers, plan: MixedPlan) -> tuple[str, ...]:
    """What went by which method."""
    share = {method: f"{saved / offers.total:.1%} of the {offers.cost.name}" for method, saved in plan.saved.items()}
    told = []
    if plan.gone:
        which = ", ".join(f"{i}" for i in plan.gone)
        told.append(f"{len(plan.gone)} of {len(offers.blocks)} blocks went, {share['depth']}: {which}")
    if plan.ranks:
        told.append(f"{counted(len(plan.ranks), 'linear')} of a lower rank now, {share['rank']}")
    if plan.widths:
        told.append(f"{counted(len(plan.widths), 'width')} cut, {share['width']}")
    return tuple(told)


def _compared(tried: Sequence[tuple[str, MixedPlan, Slimmed, float]], chosen: str, held_out: bool) -> str:
    parts = [f"{name} {lost:.4f} (predicted {plan.predicted:.4f})" for name, plan, _, lost in tried]
    text = "held-out calibration text" if held_out else "the calibration text, too little to hold any of it out"
    return f"{chosen} was chosen by what each plan loses on {text}: {', '.join(parts)}"
