"""Split what a ratio asks for over the regions of a graph: which widths go together, on which grid, at which cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import lcm

import torch

from dotresize_fx.clock import Clock
from dotresize_fx.cost import CostModel
from dotresize_fx.errors import NothingToSlimError, UsageError
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Graph
from dotresize_fx.options import Options
from dotresize_fx.passes.choose_regions import left_alone
from dotresize_fx.progress import Progress
from dotresize_fx.ranks import Ranks
from dotresize_fx.regions import Region, RegionKind
from dotresize_fx.sensitivity import measure_curves
from dotresize_fx.width_plan import WidthPlan, plan_by_curves, plan_uniformly, step_of

# Fused attentions that share KV heads take keys and values of one size, a multiple of this.
HEAD_MULTIPLE = 8
Group = tuple[Region, ...]


def plan_widths(
    graph: Graph,
    regions: Sequence[Region],
    batches: Sequence[Mapping[str, torch.Tensor]],
    total: int,
    cost: CostModel,
    options: Options,
    progress: Progress,
    task: str,
    measured: Mapping[str, torch.Tensor] | None = None,
    factors: Mapping[str, int] | None = None,
    clock: Clock | None = None,
    ranks: Ranks | None = None,
) -> tuple[WidthPlan, tuple[str, ...]]:
    """A width for each of the regions, and why some of them keep theirs.

    ``total`` is the cost of the dense model, of which the options' ratio is a share; where the graph's is less by now,
    that much less is left to remove. ``measured`` are curves of the same graph and text, if there are any yet.
    ``factors`` are, by kind, what widths must be multiples of. A ``clock`` says what widths take; where it has a target
    this is met instead of the ratio. ``ranks`` share the batches.

    Raises:
        NothingToSlimError: there is no region, or they hold too little for the ratio.
        TargetLatencyError: no widths meet the clock's target.
        UsageError: whole KV heads alone are to be cut uniformly.
    """
    left, asked = cost.total(graph), options.ratio or 0.0
    # As it was asked for where nothing went: it is named in what a refusal says.
    ratio = asked if left == total else max(0.0, 1 - (1 - asked) * total / left)
    groups, notes = pair_heads(regions) if options.head_sizes == "equal" else ([(region,) for region in regions], ())
    if options.uniform:
        groups = join_layers(groups)
    if options.allocation == "uniform":
        groups = [group for group in groups if group[0].kind is not RegionKind.HEADS]
        if regions and not groups and not notes:
            raise UsageError("--allocation uniform does not cut whole KV heads: use measured, or other --regions")
    if regions and not groups:
        raise NothingToSlimError("; ".join(notes))
    # One of each group stands for all: they take its width.
    leads = [group[-1] for group in groups]
    if options.uniform:  # where whole heads go in all layers no head gets narrower, and the other way round
        leads = [replace(lead, attention="all" if lead.attention else "") for lead in leads]
    units = {group[-1].name: sum(cost.per_unit(graph, region) for region in group) for group in groups}
    steps = {group[-1].name: _step(group, options, factors or {}) for group in groups}
    seconds: Mapping[str, torch.Tensor] | None = None
    if clock is not None and groups:
        each = clock.seconds
        seconds = {group[-1].name: torch.stack([each[region.name] for region in group]).sum(0) for group in groups}
    if clock and clock.target is not None and seconds:
        clock.check_reach(leads, seconds, steps)
    curves: Mapping[str, torch.Tensor] = {}

    def spread(plan: WidthPlan) -> WidthPlan:
        """The plan of the leads as one of all regions."""
        widths = {region.name: region.width for region in regions}
        widths |= {region.name: plan.widths[group[-1].name] for group in groups for region in group}
        return WidthPlan(widths, {name: float(curve[widths[name]]) for name, curve in curves.items()})

    settled = options.uniform and len(groups) == 1  # one width for all is what the ratio says: nothing to measure
    if not (clock and clock.target is not None) and (options.allocation == "uniform" or settled):
        plan = plan_uniformly(leads, units, left, ratio, steps=steps, cost=cost.name)
    else:
        grouped = {region.name for group in groups for region in group}
        if measured is not None:
            curves = {name: curve for name, curve in measured.items() if name in grouped}
        elif grouped:
            with progress.stage("measure sensitivity") as step:
                chosen = [region for region in regions if region.name in grouped]
                assert isinstance(graph, FxGraph)  # curves of other forms are measured before
                curves = measure_curves(graph, chosen, batches, task=task, advanced=step, ranks=ranks)
        summed = {group[-1].name: torch.stack([curves[region.name] for region in group]).sum(0) for group in groups}

        def timed(aim: float) -> WidthPlan:
            assert clock is not None
            return spread(
                plan_by_curves(
                    leads, summed, units, clock.dense, 1 - aim, steps=steps, costs=seconds, refuse=clock.refused
                )
            )

        if clock and clock.target is not None:
            return clock.settle(timed), notes
        plan = plan_by_curves(leads, summed, units, left, ratio, steps=steps, cost=cost.name, prices=seconds)
    return spread(plan), notes


def pair_heads(regions: Sequence[Region]) -> tuple[list[Group], tuple[str, ...]]:
    """Regions that take one width together: query_key and value of an attention, every other alone; and in notes how
    many were left out for what reason, so that keys and values keep one size.
    """
    sizes: dict[str, list[Region]] = {}
    for region in regions:
        if region.kind in (RegionKind.QUERY_KEY, RegionKind.VALUE):
            sizes.setdefault(region.attention, []).append(region)
    reasons = {attention: _why_not_paired(heads) for attention, heads in sizes.items()}
    groups: list[Group] = [
        (region,) for region in regions if region.attention not in sizes or region not in sizes[region.attention]
    ]
    groups += [tuple(heads) for attention, heads in sizes.items() if not reasons[attention]]
    left = left_alone(reasons[attention] for attention, heads in sizes.items() for _ in heads if reasons[attention])
    return groups, tuple(left)


def join_layers(groups: Sequence[Group]) -> list[Group]:
    """Groups of the same kinds and widths as one, so that these are the same in all layers."""
    joined: dict[tuple[tuple[str, int], ...], list[Region]] = {}
    for group in groups:
        joined.setdefault(tuple((region.kind, region.width) for region in group), []).extend(group)
    return [tuple(regions) for regions in joined.values()]


def _why_not_paired(heads: Sequence[Region]) -> str:
    """Why the widths of an attention's heads cannot be cut to one size; empty when they can."""
    if len(heads) < 2:
        other = RegionKind.VALUE if heads[0].kind is RegionKind.QUERY_KEY else RegionKind.QUERY_KEY
        return f"--head-sizes equal, and the {other} width of the same heads cannot be cut"
    if len({region.width for region in heads}) > 1:
        return "--head-sizes equal, and keys and values of the same heads are of two sizes"
    if heads[0].width <= HEAD_MULTIPLE:
        return f"--head-sizes equal, and heads of {heads[0].width} have no smaller multiple of {HEAD_MULTIPLE}"
    return ""


def _step(group: Group, options: Options, factors: Mapping[str, int]) -> int:
    factor = lcm(*(factors.get(region.kind, 1) for region in group))
    if len({region.kind for region in group}) == 1:
        return step_of(group[0], options.multiple, factor, options.finest_step)
    return lcm(HEAD_MULTIPLE, options.multiple or 1, factor)
