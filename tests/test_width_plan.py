"""The width plan: the ratio is met within a step, widths are on the grid, and impossible wishes are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotresize_fx.errors import NothingToSlimError, UsageError
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.width_plan import WidthPlan, check_ratio, grid, plan_by_curves, plan_uniformly


def regions(widths: list[int]) -> list[Region]:
    return [
        Region(f"ffn {i}", RegionKind.FFN, Symmetry.PERMUTATION, width, ("w",), ("r",))
        for i, width in enumerate(widths)
    ]


def removed(chosen: list[Region], units: dict[str, int], plan: WidthPlan) -> int:
    return sum((region.width - plan.widths[region.name]) * units[region.name] for region in chosen)


sizes = st.lists(st.tuples(st.integers(8, 700), st.integers(1, 50)), min_size=1, max_size=8)
ratios = st.floats(0.001, 0.85)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(sizes=sizes, ratio=ratios, rest=st.integers(0, 5000), multiple=st.sampled_from([1, 8, 16, 64]))
def test_meets_the_ratio_within_a_step_on_the_grid(
    sizes: list[tuple[int, int]], ratio: float, rest: int, multiple: int
) -> None:
    chosen = regions([width for width, _ in sizes])
    units = {region.name: unit for region, (_, unit) in zip(chosen, sizes, strict=True)}
    held = sum(width * unit for width, unit in sizes)
    wanted = ratio * held
    total = held + rest
    steps = {region.name: grid(region.width, multiple) for region in chosen}
    try:
        plan = plan_uniformly(chosen, units, total, wanted / total, steps=steps)
    except NothingToSlimError:
        assert any(r.width * (1 - ratio) < steps[r.name] + 1e-6 for r in chosen)
        return
    for region in chosen:
        width = plan.widths[region.name]
        assert 0 < width <= region.width
        assert width % steps[region.name] == 0 or width == region.width
    largest = max(steps[name] * unit for name, unit in units.items())
    assert abs(removed(chosen, units, plan) - wanted) <= largest


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes=sizes, low=ratios, high=ratios)
def test_a_higher_ratio_never_removes_a_step_less(sizes: list[tuple[int, int]], low: float, high: float) -> None:
    low, high = sorted((low, high))
    chosen = regions([width + 64 for width, _ in sizes])
    units = {region.name: unit for region, (_, unit) in zip(chosen, sizes, strict=True)}
    total = sum(region.width * units[region.name] for region in chosen)
    less, more = (plan_uniformly(chosen, units, total, ratio) for ratio in (low, high))
    step = max(grid(region.width) * units[region.name] for region in chosen)
    assert removed(chosen, units, more) >= removed(chosen, units, less) - step
    for region in chosen:
        assert more.widths[region.name] <= less.widths[region.name] + grid(region.width)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(width=st.integers(9, 60).map(lambda steps: steps * 16), count=st.integers(1, 6), low=ratios, high=ratios)
def test_equal_regions_shrink_monotonically(width: int, count: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    chosen = regions([width] * count)
    units = {region.name: 3 for region in chosen}
    less, more = (plan_uniformly(chosen, units, width * count * 3, ratio) for ratio in (low, high))
    assert all(more.widths[name] <= less.widths[name] for name in more.widths)
    assert max(more.widths.values()) - min(more.widths.values()) <= 16


def test_an_example() -> None:
    """SmolLM2: 30 FFNs of 1536, three matrices of 576 columns each; 20 % of all block weights."""
    chosen = regions([1536] * 30)
    units = {region.name: 3 * 576 for region in chosen}
    plan = plan_uniformly(chosen, units, 30 * 3538944, 0.2)
    assert set(plan.widths.values()) == {1120, 1136}
    assert removed(chosen, units, plan) / (30 * 3538944) == pytest.approx(0.2, abs=1e-3)


def test_ratio_zero_keeps_every_width() -> None:
    plan = plan_uniformly(regions([100, 33]), {"ffn 0": 1, "ffn 1": 1}, 133, 0)
    assert plan.widths == {"ffn 0": 100, "ffn 1": 33}


@pytest.mark.parametrize(("width", "step"), [(1536, 16), (128, 16), (127, 8), (64, 8), (16, 2), (8, 1), (3, 1)])
def test_small_regions_take_a_finer_grid(width: int, step: int) -> None:
    assert grid(width) == step


@pytest.mark.parametrize(("width", "step"), [(8, 8), (16, 8), (32, 8), (64, 8), (128, 16), (4096, 16)])
def test_no_grid_is_finer_than_what_kernels_want(width: int, step: int) -> None:
    assert grid(width, finest=8) == step


def test_a_region_without_a_smaller_width_on_its_grid_stays_whole() -> None:
    chosen = regions([16, 64])
    units, steps = {"ffn 0": 1, "ffn 1": 1}, {"ffn 0": 16, "ffn 1": 16}
    curves = {region.name: torch.linspace(1, 0, region.width + 1).double() for region in chosen}
    for plan in (
        plan_uniformly(chosen, units, 80, 0.4, steps=steps),
        plan_by_curves(chosen, curves, units, 80, 0.4, steps=steps),
    ):
        assert plan.widths == {"ffn 0": 16, "ffn 1": 32}
    with pytest.raises(NothingToSlimError, match=r"give up at most 0\.0;"):
        plan_uniformly(chosen[:1], units, 80, 0.1, steps=steps)


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.2, float("nan")])
def test_ratios_that_are_none_are_refused(ratio: float) -> None:
    with pytest.raises(UsageError, match="at least 0 and below 1"):
        check_ratio(ratio)


def test_ratios_that_are_some_pass() -> None:
    check_ratio(0)
    check_ratio(0.999)


def test_nothing_matched_is_refused() -> None:
    with pytest.raises(NothingToSlimError, match="no region matched"):
        plan_uniformly([], {}, 100, 0.2)


def test_a_region_that_would_vanish_is_refused_with_what_there_is() -> None:
    chosen = regions([128])
    with pytest.raises(NothingToSlimError, match=r"hold 64% of the block weights and give up at most 0\.56") as caught:
        plan_uniformly(chosen, {"ffn 0": 1}, 200, 0.6)
    assert "\n" not in str(caught.value)
    assert plan_uniformly(chosen, {"ffn 0": 1}, 200, 0.56).widths == {"ffn 0": 16}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=sizes, rest=st.integers(0, 5000))
def test_the_ratio_that_a_refusal_names_can_be_had(sizes: list[tuple[int, int]], rest: int) -> None:
    chosen = regions([width for width, _ in sizes])
    units = {region.name: unit for region, (_, unit) in zip(chosen, sizes, strict=True)}
    total = sum(region.width * units[region.name] for region in chosen) + rest
    with pytest.raises(NothingToSlimError) as caught:
        plan_uniformly(chosen, units, total, 0.999)
    named = float(str(caught.value).split("at most ")[1].split(";")[0])
    assert all(width > 0 for width in plan_uniformly(chosen, units, total, named).widths.values())
