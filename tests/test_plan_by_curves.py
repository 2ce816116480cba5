"""Widths by measured curves: the least loss for what goes, and whole KV heads or widths of heads, never both."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.width_plan import WidthPlan, grid, plan_by_curves, plan_uniformly, step_of


def regions(widths: list[int]) -> list[Region]:
    return [
        Region(f"ffn {i}", RegionKind.FFN, Symmetry.PERMUTATION, width, ("w",), ("r",))
        for i, width in enumerate(widths)
    ]


def removed(chosen: list[Region], units: dict[str, int], plan: WidthPlan) -> int:
    return sum((region.width - plan.widths[region.name]) * units[region.name] for region in chosen)


Curves = dict[str, torch.Tensor]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Region], Curves, dict[str, int]]:
    """Two or three FFNs with convex losses, and what one neuron of each weighs."""
    widths = draw(st.lists(st.integers(8, 30), min_size=2, max_size=3))
    chosen = regions(widths)
    curves = {}
    for region in chosen:
        # Each next neuron is dearer: sums of sorted prices, some of them nothing.
        prices = sorted(draw(st.lists(st.integers(0, 100), min_size=region.width, max_size=region.width)))
        curves[region.name] = torch.tensor([0, *prices], dtype=torch.float64).cumsum(0).flip(0)
    units = {region.name: draw(st.integers(1, 20)) for region in chosen}
    return chosen, curves, units


def total_of(chosen: list[Region], units: dict[str, int]) -> int:
    return sum(region.width * units[region.name] for region in chosen)


def loss(curves: Curves, plan: WidthPlan) -> float:
    return sum(float(curves[name][width]) for name, width in plan.widths.items())


def on_grid(region: Region) -> list[int]:
    step = grid(region.width)
    return [*range(step, region.width, step), region.width]


def step_weight(chosen: list[Region], units: dict[str, int]) -> int:
    return max(grid(region.width) * units[region.name] for region in chosen)


def step_loss(chosen: list[Region], curves: Curves, plan: WidthPlan) -> float:
    """Of the dearest last step that any region took."""
    lost = [0.0]
    for region in chosen:
        widths, width = on_grid(region), plan.widths[region.name]
        if width < region.width:
            above = widths[widths.index(width) + 1]
            lost.append(float(curves[region.name][width] - curves[region.name][above]))
    return max(lost)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems(), ratio=st.floats(0.01, 0.8))
def test_curves_give_the_optimum_within_a_step(
    problem: tuple[list[Region], Curves, dict[str, int]], ratio: float
) -> None:
    chosen, curves, units = problem
    total = total_of(chosen, units)
    try:
        plan = plan_by_curves(chosen, curves, units, total, ratio)
    except NothingToSlimError:
        assert sum(on_grid(r)[0] * units[r.name] for r in chosen) > (1 - ratio) * total
        return
    wanted = ratio * total
    # Sums of floats that should be whole numbers.
    assert wanted - 1e-6 <= removed(chosen, units, plan) <= wanted + step_weight(chosen, units)
    assert all(plan.widths[region.name] in on_grid(region) for region in chosen)
    assert plan.losses == {name: float(curves[name][width]) for name, width in plan.widths.items()}
    rivals = (
        WidthPlan({region.name: width for region, width in zip(chosen, widths, strict=True)})
        for widths in product(*[on_grid(region) for region in chosen])
    )
    best = min(loss(curves, rival) for rival in rivals if removed(chosen, units, rival) >= wanted - 1e-6)
    # What is taken before the last step is optimal for what it removes.
    assert loss(curves, plan) <= best + step_loss(chosen, curves, plan) + 1e-9


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems(), ratio=st.floats(0.01, 0.7))
def test_curves_do_no_worse_than_the_same_share_everywhere(
    problem: tuple[list[Region], Curves, dict[str, int]], ratio: float
) -> None:
    chosen, curves, units = problem
    total = total_of(chosen, units)
    try:
        uniform = plan_uniformly(chosen, units, total, ratio)
    except NothingToSlimError:
        reject()
    gone = removed(chosen, units, uniform)
    plan = plan_by_curves(chosen, curves, units, total, gone / total)
    assert removed(chosen, units, plan) >= gone - 1e-6
    assert loss(curves, plan) <= loss(curves, uniform) + step_loss(chosen, curves, plan) + 1e-9


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems(), low=st.floats(0, 0.8), high=st.floats(0, 0.8), heads=st.booleans())
def test_more_ratio_never_widens(
    problem: tuple[list[Region], Curves, dict[str, int]], low: float, high: float, heads: bool
) -> None:
    chosen, curves, units = problem
    if heads:
        chosen = [*chosen, *attention()]
        curves |= {region.name: torch.linspace(9, 0, region.width + 1).double() ** 2 for region in attention()}
        units |= {"a query_key": 2, "a kv_heads": 9, "a value": 2}
    total = total_of(chosen, units)
    low, high = sorted((low, high))
    try:
        less, more = (plan_by_curves(chosen, curves, units, total, ratio) for ratio in (low, high))
    except NothingToSlimError:
        reject()
    assert all(more.widths[name] <= less.widths[name] for name in more.widths)
    assert loss(curves, more) >= loss(curves, less)


def attention() -> list[Region]:
    """The three widths of one attention of four heads of sixteen."""
    linear, rotary = Symmetry.HEADWISE_LINEAR, Symmetry.ROTARY_PAIRS
    return [
        Region("a query_key", RegionKind.QUERY_KEY, rotary, 16, ("q", "k"), (), heads=4, attention="a"),
        Region("a kv_heads", RegionKind.HEADS, Symmetry.PERMUTATION, 4, ("q", "k", "v"), ("o",), attention="a"),
        Region("a value", RegionKind.VALUE, linear, 16, ("v",), ("o",), heads=4, attention="a"),
    ]


UNITS = {"a query_key": 8, "a kv_heads": 64, "a value": 8}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(heights=st.lists(st.floats(0.01, 100), min_size=3, max_size=3), ratio=st.floats(0.01, 0.7))
def test_whole_heads_and_widths_of_heads_are_never_both_cut(heights: list[float], ratio: float) -> None:
    chosen = attention()
    curves = {
        region.name: height * torch.linspace(1, 0, region.width + 1).double() ** 2
        for region, height in zip(chosen, heights, strict=True)
    }
    try:
        plan = plan_by_curves(chosen, curves, UNITS, 512, ratio)
    except NothingToSlimError:
        reject()
    cut = {str(region.kind) for region in chosen if plan.widths[region.name] < region.width}
    assert cut == {"kv_heads"} or cut <= {"query_key", "value"}
    assert plan.widths["a query_key"] % 2 == 0  # whole rotary pairs


def test_whichever_of_heads_and_widths_is_cheaper_is_cut() -> None:
    chosen = attention()
    for cheap in ("a kv_heads", "a value"):
        curves = {
            region.name: (1 if region.name == cheap else 100) * torch.linspace(1, 0, region.width + 1).double()
            for region in chosen
        }
        plan = plan_by_curves(chosen, curves, UNITS, 512, 0.1)
        assert [name for name in plan.widths if plan.widths[name] < 16 and name != "a kv_heads"] == (
            [] if cheap == "a kv_heads" else ["a value"]
        )
        assert (plan.widths["a kv_heads"] < 4) == (cheap == "a kv_heads")


def test_another_attentions_heads_may_go_all_the_same() -> None:
    one, other = attention(), [replace(region, name=f"b{region.name}", attention="b") for region in attention()]
    chosen = [one[2], other[1]]
    curves = {region.name: torch.linspace(1, 0, region.width + 1).double() ** 2 for region in chosen}
    plan = plan_by_curves(chosen, curves, {"a value": 8, "ba kv_heads": 64}, 384, 0.4)
    assert all(plan.widths[region.name] < region.width for region in chosen)


def test_an_infinite_loss_is_never_chosen() -> None:
    chosen = regions([64, 64])
    curves = {region.name: torch.linspace(1, 0, 65).double() for region in chosen}
    curves["ffn 0"][:48] = torch.inf
    curves["ffn 1"] *= 1000
    units = {"ffn 0": 1, "ffn 1": 1}
    plan = plan_by_curves(chosen, curves, units, 128, 0.25)
    assert plan.widths == {"ffn 0": 48, "ffn 1": 48}
    with pytest.raises(NothingToSlimError, match=r"give up at most 0\.56"):
        plan_by_curves(chosen, curves, units, 128, 0.6)  # 16 of one, 56 of the other


def test_a_dear_step_before_cheap_ones_is_taken_with_them() -> None:
    """The first eight neurons cost most, all further ones nothing: the hull sees past them, marginal steps do not."""
    chosen = regions([64, 64])
    curves = {"ffn 0": torch.full((65,), 10.0).double(), "ffn 1": torch.linspace(64, 0, 65).double()}
    curves["ffn 0"][64] = 0
    units = {"ffn 0": 1, "ffn 1": 1}
    assert plan_by_curves(chosen, curves, units, 128, 0.25).widths == {"ffn 0": 32, "ffn 1": 64}


def test_curves_keep_every_width_at_ratio_zero() -> None:
    chosen = attention()
    curves = {region.name: torch.zeros(region.width + 1).double() for region in chosen}
    plan = plan_by_curves(chosen, curves, UNITS, 512, 0)
    assert plan.widths == {region.name: region.width for region in chosen}
    assert set(plan.losses.values()) == {0.0}


def test_curves_of_nothing_are_refused() -> None:
    with pytest.raises(NothingToSlimError, match="no region matched"):
        plan_by_curves([], {}, {}, 100, 0.2)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(problem=problems(), rest=st.integers(0, 500))
def test_the_ratio_that_a_refusal_by_curves_names_can_be_had(
    problem: tuple[list[Region], Curves, dict[str, int]], rest: int
) -> None:
    chosen, curves, units = problem
    total = total_of(chosen, units) + rest
    with pytest.raises(NothingToSlimError) as caught:
        plan_by_curves(chosen, curves, units, total, 0.999)
    named = float(str(caught.value).split("at most ")[1].split(";")[0])
    assert all(width > 0 for width in plan_by_curves(chosen, curves, units, total, named).widths.values())


@pytest.mark.parametrize(("multiple", "steps"), [(None, [2, 1, 2, 16]), (8, [8, 1, 8, 8]), (5, [10, 1, 5, 5])])
def test_a_multiple_that_is_asked_for_holds_everywhere_but_for_heads(multiple: int | None, steps: list[int]) -> None:
    """By default heads of 16 go by twos and FFNs of 512 by sixteens; rotary pairs stay whole, KV heads are counted."""
    assert [step_of(region, multiple) for region in (*attention(), *regions([512]))] == steps


def test_a_step_is_a_multiple_of_what_the_model_asks_for() -> None:
    """A stream of 576 under nine heads goes by 72: eight steps, where sixteens would leave four."""
    stream = Region("stream", RegionKind.RESIDUAL, Symmetry.ORTHOGONAL, 576, ("w",), ("r",))
    assert [step_of(stream, factor=factor) for factor in (1, 9, 64)] == [16, 72, 64]
    assert step_of(stream, 8, 9) == 72
    heads = next(region for region in attention() if region.kind is RegionKind.HEADS)
    assert step_of(heads, factor=2) == 2
