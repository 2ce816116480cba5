"""The width plan: how the share of the cost to remove is split over the regions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, lcm

import torch

from dotresize_fx.errors import DotresizeError, NothingToSlimError, UsageError
from dotresize_fx.regions import ATTENTION_KINDS, Region, RegionKind, Symmetry

# Kernels like widths on a grid (a width off it ran 3.8 times slower than the dense one on a GPU). Where no multiple is
# asked for, small regions take a finer one, so that a ratio can still be met: heads of 64 go by 8.
MULTIPLE = 16
STEPS_AT_LEAST = 8

NO_REGION = "no region matched, so nothing can be slimmed: `dotresize-fx inspect` says why"


@dataclass(frozen=True)
class WidthPlan:
    """``widths`` by region name. ``losses``: what the measured curves predict for each region's cut, where there
    are any, in nats a token (encoders: in lost cosine of the pooled output).
    """

    widths: Mapping[str, int]
    losses: Mapping[str, float] = field(default_factory=dict)


def check_ratio(ratio: float) -> None:
    """Raises UsageError unless 0 <= ratio < 1."""
    if not 0 <= ratio < 1:
        raise UsageError(f"--ratio is {ratio}: it is a share, at least 0 and below 1")


def grid(width: int, multiple: int = MULTIPLE, factor: int = 1, finest: int = 1) -> int:
    """The largest power-of-two divisor of ``multiple``, made a multiple of ``factor``, that leaves a region of this
    width enough steps; but no divisor below ``finest``.
    """
    while multiple > finest and width < lcm(multiple, factor) * STEPS_AT_LEAST:
        multiple //= 2
    return lcm(multiple, factor)


def step_of(region: Region, multiple: int | None = None, factor: int = 1, finest: int = 1) -> int:
    """The region's grid: the multiple that was asked for, or MULTIPLE and a finer one for small widths, down to
    ``finest``, a power of two.

    Whole rotary pairs go where they go in pairs; KV heads are counted, and go one by one. Every step is a multiple of
    ``factor``.
    """
    if region.kind is RegionKind.HEADS:
        return factor
    step = grid(region.width, factor=factor, finest=finest) if multiple is None else lcm(multiple, factor)
    return lcm(step, 2) if region.symmetry is Symmetry.ROTARY_PAIRS else step


def _too_much(ratio: float, held: float, most: float, cost: str) -> str:
    return (
        f"--ratio {ratio} would make a region vanish: the chosen regions hold {held:.0%} of the {cost} "
        f"and give up at most {floor(most * 100) / 100}; choose a lower ratio or more --regions"
    )


def plan_uniformly(
    regions: Sequence[Region],
    cost_per_unit: Mapping[str, int],
    total: int,
    ratio: float,
    *,
    steps: Mapping[str, int] | None = None,
    cost: str = "block weights",
) -> WidthPlan:
    """Cut every region by the same share, so that ``ratio`` of ``total`` goes.

    cost_per_unit: what one unit of each region's width costs. total: what all blocks cost, in the same unit; ``cost``
    names it in words. steps: the grid of each region, by default that of :func:`step_of`; a region without a smaller
    width on its grid stays whole. The regions with most to lose by rounding are rounded so that the sum comes within
    one step of the ratio.

    Raises:
        NothingToSlimError: there is no region, or they hold too little for the ratio.
    """
    if not regions:
        raise NothingToSlimError(NO_REGION)
    steps = steps or {region.name: step_of(region) for region in regions}
    whole = {region.name: region.width for region in regions}
    if ratio == 0:
        return WidthPlan(whole)
    regions = [region for region in regions if steps[region.name] < region.width]
    if not regions:
        raise NothingToSlimError(_too_much(ratio, 0, 0, cost))
    held = sum(region.width * cost_per_unit[region.name] for region in regions)
    wanted = ratio * total
    share = wanted / held
    most = min(1 - steps[region.name] / region.width for region in regions)
    if share > most + 1e-9:
        raise NothingToSlimError(_too_much(ratio, held / total, most * held / total, cost))
    ideal = {region.name: max(region.width * (1 - share), steps[region.name]) for region in regions}
    widths = {name: int(width // steps[name] * steps[name]) for name, width in ideal.items()}
    removed = sum((region.width - widths[region.name]) * cost_per_unit[region.name] for region in regions)
    for region in sorted(regions, key=lambda r: (widths[r.name] - ideal[r.name], r.name)):
        # A width that was never on the grid has no whole step above it: there the next one is the dense width.
        above = min(widths[region.name] + steps[region.name], region.width)
        gain = (above - widths[region.name]) * cost_per_unit[region.name]
        if removed - gain / 2 >= wanted:
            widths[region.name] = above
            removed -= gain
    return WidthPlan(whole | widths)


def plan_by_curves(
    regions: Sequence[Region],
    curves: Mapping[str, torch.Tensor],
    cost_per_unit: Mapping[str, int],
    total: float,
    ratio: float,
    *,
    steps: Mapping[str, int] | None = None,
    cost: str = "block weights",
    costs: Mapping[str, torch.Tensor] | None = None,
    prices: Mapping[str, torch.Tensor] | None = None,
    refuse: Callable[[float], DotresizeError] | None = None,
) -> WidthPlan:
    """The widths that remove ``ratio`` of ``total`` at the least sum of losses.

    curves: (n + 1,) by region name, the loss at each width; the rest is as for :func:`plan_uniformly`. costs: (n + 1,)
    by region name, what each width costs where that is no multiple of it; they stand for ``cost_per_unit``. prices:
    likewise, what a loss is weighed against where that is something else than what is counted. refuse: what to raise,
    by the share that can be removed, where it is too little. Every curve is
    replaced by its lower convex hull over the grid; taking its segments in the order of loss per cost is then the
    exact optimum of the separable problem (Fox 1966, "Discrete optimization via marginal analysis"), up to the step
    that meets the ratio. Whole KV heads and the widths of the same attention's heads share weights: whichever comes
    first rules the other out.

    Raises:
        NothingToSlimError: there is no region, or they hold too little for the ratio.
    """
    if not regions:
        raise NothingToSlimError(NO_REGION)
    steps = steps or {region.name: step_of(region) for region in regions}
    widths = {region.name: region.width for region in regions}
    wanted, removed = ratio * total, 0.0
    counted = costs or {r.name: torch.arange(r.width + 1).double() * cost_per_unit[r.name] for r in regions}
    weighed = prices or counted
    segments = sorted(
        (
            segment
            for region in regions
            for segment in _hull(region, curves[region.name], weighed[region.name], steps[region.name])
        ),
        key=lambda segment: (segment.price, segment.region.name, -segment.below),
    )
    taken: dict[str, RegionKind] = {}
    for segment in segments:
        region, step = segment.region, steps[segment.region.name]
        whole = region.kind is RegionKind.HEADS
        if region.kind in ATTENTION_KINDS and (taken.get(region.attention, region.kind) is RegionKind.HEADS) != whole:
            continue
        while removed < wanted and widths[region.name] > segment.below:
            taken[region.attention] = region.kind
            width = max(segment.below, (-(-widths[region.name] // step) - 1) * step)
            removed += float(counted[region.name][widths[region.name]] - counted[region.name][width])
            widths[region.name] = width
    if removed < wanted - 1e-9 * total:
        if refuse is not None:
            raise refuse(removed / total)
        held = sum(float(counted[region.name][-1]) for region in regions if not _whole(region))
        raise NothingToSlimError(_too_much(ratio, held / total, removed / total, cost))
    return WidthPlan(widths, {r.name: float(curves[r.name][widths[r.name]]) for r in regions})


def _whole(region: Region) -> bool:
    return region.kind is RegionKind.HEADS


@dataclass(frozen=True)
class _Segment:
    region: Region
    below: int  # the width at its end
    price: float  # loss per cost removed on the way


def _hull(region: Region, curve: torch.Tensor, cost: torch.Tensor, step: int) -> Sequence[_Segment]:
    """The lower convex hull of a region's losses over what its widths on the grid save, from the whole width down.

    A width that saves nothing over a larger one is none of its corners.
    """
    below = [width for width in range(step, region.width, step) if curve[width].isfinite()]
    widths = [region.width, *reversed(below)]
    losses, costs = curve[widths].cummax(0).values.tolist(), cost[widths].tolist()
    segments, at = [], 0
    while at < len(widths) - 1:
        saved = [(i, costs[at] - costs[i]) for i in range(at + 1, len(widths))]
        prices = [((losses[i] - losses[at]) / saving, -i) for i, saving in saved if saving > 0]
        if not prices:
            break
        price, best = min(prices)
        at = -best
        segments.append(_Segment(region, widths[at], price))
    return segments
