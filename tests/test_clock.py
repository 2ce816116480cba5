"""Widths by the clock: from made-up times of kernels to a plan that meets a target when it is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from dotresize_fx.clock import Clock, Measured, between, rising
from dotresize_fx.errors import TargetLatencyError
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.width_plan import WidthPlan, plan_by_curves
from dotresize_fx.workload import Workload

Curves = dict[str, torch.Tensor]


def ffns(widths: list[int]) -> list[Region]:
    return [
        Region(f"ffn {i}", RegionKind.FFN, Symmetry.PERMUTATION, width, ("w",), ("r",))
        for i, width in enumerate(widths)
    ]


def exact(share: float) -> Measured:
    return share, share - 0.005, share + 0.005


def clock_of(seconds: Curves, target: float, kept: float = 1.0, fixed: float = 1.0) -> Clock:
    """A clock on a machine on which a model saves ``kept`` of what its kernels do."""
    dense = fixed + sum(float(curve[-1]) for curve in seconds.values())

    def rehearse(widths: Mapping[str, int]) -> Measured:
        return exact(1 - kept * (1 - clock.predicted(widths)))

    clock = Clock(Workload(), seconds, dense, rehearse, target)
    return clock


def planner(clock: Clock, regions: list[Region], losses: Curves) -> Callable[[float], WidthPlan]:
    def plan(aim: float) -> WidthPlan:
        return plan_by_curves(regions, losses, {}, clock.dense, 1 - aim, costs=clock.seconds, refuse=clock.refused)

    return plan


# -- times -----------------------------------------------------------------------------------------


def test_noise_that_says_wider_is_faster_is_pooled() -> None:
    assert rising([1.0, 3.0, 2.0, 2.0, 5.0]) == pytest.approx([1, 7 / 3, 7 / 3, 7 / 3, 5])
    assert rising([2.0, 2.0, 7.0]) == [2, 2, 7]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.dictionaries(st.integers(1, 40), st.floats(1e-6, 1.0), min_size=1))
def test_times_between_samples_never_fall(samples: dict[int, float]) -> None:
    widest = max(samples)
    curve = between(samples, widest)
    assert curve.shape == (widest + 1,)
    assert bool((curve.diff() >= -1e-12).all())
    assert min(samples.values()) - 1e-9 <= float(curve[0]) <= float(curve[-1]) <= max(samples.values()) + 1e-9


def test_a_straight_line_between_two_samples() -> None:
    curve = between({4: 1.0, 8: 3.0}, 8)
    assert curve.tolist() == [1, 1, 1, 1, 1, 1.5, 2, 2.5, 3]


# -- plans -----------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Region], Curves, Curves]:
    """Regions, their times (some widths save nothing over the next) and their losses, neither of them convex."""
    regions = ffns(draw(st.lists(st.integers(16, 40), min_size=1, max_size=3)))
    tables = []
    for highest in (5, 100):
        steps = {r.name: draw(st.lists(st.integers(0, highest), min_size=r.width, max_size=r.width)) for r in regions}
        tables.append({name: torch.tensor([0, *found], dtype=torch.float64).cumsum(0) for name, found in steps.items()})
    seconds, falling = tables
    return regions, seconds, {name: curve.flip(0) - curve[0] for name, curve in falling.items()}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems(), low=st.floats(0.2, 0.99), high=st.floats(0.2, 0.99))
def test_a_larger_target_never_gives_narrower_widths(
    problem: tuple[list[Region], Curves, Curves], low: float, high: float
) -> None:
    regions, seconds, losses = problem
    low, high = sorted((low, high))
    clock = clock_of(seconds, low)
    try:
        faster, slower = (planner(clock, regions, losses)(aim) for aim in (low, high))
    except TargetLatencyError:
        reject()
    assert all(faster.widths[name] <= slower.widths[name] for name in faster.widths)
    assert clock.predicted(faster.widths) <= low + 1e-9
    assert clock.predicted(slower.widths) <= high + 1e-9


def test_a_width_that_saves_no_time_is_not_taken() -> None:
    """Times fall only at every 16: the grid of 4 between them is left alone."""
    region = ffns([48])[0]
    seconds = {region.name: torch.tensor([float(-(-width // 16)) for width in range(49)]).double()}
    losses = {region.name: torch.arange(48, -1, -1).double()}
    for aim in (0.9, 0.8, 0.7):
        plan = plan_by_curves([region], losses, {}, 4.0, 1 - aim, steps={region.name: 4}, costs=seconds)
        assert plan.widths[region.name] in (32, 16)


def test_prices_rule_the_split_and_weights_the_sum() -> None:
    """Two FFNs alike in weights and losses: the one whose kernels are slow goes first, until the weights are met."""
    slow, fast = regions = ffns([64, 64])
    losses = {region.name: torch.arange(64, -1, -1).double() for region in regions}
    seconds = {slow.name: torch.arange(65).double() * 3, fast.name: torch.arange(65).double()}
    units = {region.name: 10 for region in regions}
    plan = plan_by_curves(regions, losses, units, 1280, 0.25, prices=seconds)
    assert plan.widths == {slow.name: 32, fast.name: 64}


# -- the search ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1.0, 0.6, 1.4])
def test_plans_are_corrected_by_what_is_measured(kept: float) -> None:
    regions = ffns([512, 512])
    seconds = {region.name: torch.arange(513).double() / 512 for region in regions}
    losses = {region.name: torch.arange(512, -1, -1).double() ** 2 for region in regions}
    clock = clock_of(seconds, 0.8, kept)
    plan = clock.settle(planner(clock, regions, losses))
    value, _, high = next(trial.measured for trial in clock.trials if trial.plan == plan)
    assert value <= 0.8 + 1e-9 or kept == 1.0
    assert value >= 0.8 - 0.02  # it lost no more than it had to: a step of one region is 0.01 of the dense latency
    assert len(clock.trials) <= 3
    assert high > 0


def test_between_a_plan_that_met_and_one_that_missed_others_are_tried() -> None:
    """Kernels that say nothing of a jump: below 0.85 predicted, models are faster by 0.15 at once."""
    regions = ffns([512, 512])
    seconds = {region.name: torch.arange(513).double() / 512 for region in regions}
    losses = {region.name: torch.arange(512, -1, -1).double() ** 2 for region in regions}
    clock = clock_of(seconds, 0.9)

    def rehearse(widths: Mapping[str, int]) -> Measured:
        predicted = clock.predicted(widths)
        return exact(predicted - 0.1 if predicted < 0.85 else predicted + 0.05)

    clock.rehearse = rehearse
    plan = clock.settle(planner(clock, regions, losses))
    chosen = next(trial for trial in clock.trials if trial.plan == plan)
    first_that_met = next(trial for trial in clock.trials if trial.measured[0] <= 0.9)
    assert first_that_met.predicted < chosen.predicted < 0.85 + 1e-9
    assert chosen.measured[0] <= 0.9


def test_what_no_plan_reaches_is_said_with_the_best() -> None:
    regions = ffns([64])
    seconds = {regions[0].name: torch.arange(65).double() / 64}
    clock = clock_of(seconds, 0.3)
    with pytest.raises(TargetLatencyError, match=r"predicted at 0\.5\d\d of the dense latency") as refused:
        clock.check_reach(regions, seconds, {regions[0].name: 8})
    assert refused.value.exit_code == 19
    with pytest.raises(TargetLatencyError, match=r"predicted at 0\.5"):
        clock.settle(planner(clock, regions, {regions[0].name: torch.arange(64, -1, -1).double()}))


def test_what_is_only_predicted_is_not_enough() -> None:
    regions = ffns([64])
    seconds = {regions[0].name: torch.arange(65).double() / 64}
    clock = clock_of(seconds, 0.7, kept=0.2)
    with pytest.raises(TargetLatencyError, match=r"the best of \d found takes 0\.9\d\d of the dense latency"):
        clock.settle(planner(clock, regions, {regions[0].name: torch.arange(64, -1, -1).double()}))


def test_whole_heads_and_their_widths_are_not_both_counted_on() -> None:
    linear = Symmetry.HEADWISE_LINEAR
    heads = Region("kv_heads", RegionKind.HEADS, linear, 4, ("w",), ("r",), attention="a")
    value = Region("value", RegionKind.VALUE, linear, 16, ("w",), ("r",), attention="a")
    seconds = {"kv_heads": torch.arange(5).double() / 4, "value": torch.arange(17).double() / 16}
    clock = clock_of(seconds, 0.7)  # of 3 seconds: 2 s would have to stay, and one alone leaves 2.25
    with pytest.raises(TargetLatencyError, match=r"0\.750"):
        clock.check_reach([heads, value], seconds, {"kv_heads": 1, "value": 8})
