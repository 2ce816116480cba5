"""Frontiers: hulls of alternatives, sums of what goes together, and the choice of least loss."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from dotresize_fx.mixed.frontier import NOTHING, Frontier, Point, choose, either, hull, together

points = st.tuples(st.integers(1, 40), st.integers(0, 100))


def named(what: str, *drawn: tuple[int, int]) -> list[Point]:
    return [Point(saved, loss, {("width", what): i}) for i, (saved, loss) in enumerate(drawn)]


def slopes(frontier: Frontier) -> list[float]:
    return [(b.loss - a.loss) / (b.saved - a.saved) for a, b in itertools.pairwise(frontier)]


@given(drawn=st.lists(points, max_size=8))
def test_a_hull_is_convex_and_below_all_points(drawn: list[tuple[int, int]]) -> None:
    found = hull(named("a", *drawn))
    assert found[0] == NOTHING
    assert slopes(found) == sorted(slopes(found))
    for saved, loss in drawn:
        ends = [(a, b) for a, b in itertools.pairwise(found) if a.saved <= saved <= b.saved]
        assert ends
        a, b = ends[0]
        assert loss >= a.loss + (b.loss - a.loss) * (saved - a.saved) / (b.saved - a.saved) - 1e-9


def test_of_alternatives_only_one_is_left_in_a_point() -> None:
    found = either(hull(named("width", (10, 1))), hull(named("rank", (30, 5))))
    assert [dict(point.sizes) for point in found] == [{}, {("width", "width"): 0}, {("width", "rank"): 0}]
    both = together(found, hull(named("other", (5, 100))))
    assert ("width", "width") not in both[-1].sizes
    assert (both[-1].saved, both[-1].loss) == (35, 105)


def test_what_goes_together_is_taken_by_loss_per_cost() -> None:
    found = together(hull(named("a", (10, 1), (20, 10))), hull(named("b", (10, 5))))
    assert [(point.saved, point.loss) for point in found] == [(0, 0), (10, 1), (20, 6), (30, 15)]


def least(frontiers: Sequence[Frontier], wanted: float) -> float | None:
    """By trying all."""
    sums = [
        (sum(point.saved for point in chosen), sum(point.loss for point in chosen))
        for chosen in itertools.product(*frontiers)
    ]
    return min((loss for saved, loss in sums if saved >= wanted - 1e-9), default=None)


@settings(max_examples=200)
@given(
    drawn=st.lists(st.lists(points, min_size=1, max_size=4), min_size=1, max_size=4),
    share=st.floats(0.01, 1.0),
)
def test_a_choice_saves_what_is_wanted_and_loses_little_more_than_the_best(
    drawn: list[list[tuple[int, int]]], share: float
) -> None:
    frontiers = [hull(named(f"{i}", *some)) for i, some in enumerate(drawn)]
    most = sum(frontier[-1].saved for frontier in frontiers)
    wanted = share * most
    found = choose(frontiers, wanted)
    best = least(frontiers, wanted)
    assert (found is None) == (best is None)
    assert choose(frontiers, most + 1) is None
    if found is not None and best is not None:
        assert found.saved >= wanted - 1e-6
        # A greedy choice of whole segments is at most its last, dearest one above the best.
        dearest = max((b.loss - a.loss for frontier in frontiers for a, b in itertools.pairwise(frontier)), default=0)
        assert best - 1e-9 <= found.loss <= best + dearest + 1e-9


def test_a_coarse_cut_is_left_out_where_finer_ones_lose_less() -> None:
    block = hull([Point(100, 50, {("depth", "block"): 0})])
    fine = hull([Point(10 * i, i * i, {("width", "ffn"): 10 - i}) for i in range(1, 10)])
    found = choose([block, fine], 30)
    assert found is not None
    assert (found.saved, found.loss) == (30, 9)
    found = choose([block, fine], 100)
    assert found is not None
    assert (found.saved, found.loss, set(found.sizes)) == (100, 50, {("depth", "block")})


def test_nothing_wanted_is_nothing_cut() -> None:
    assert choose([hull(named("a", (1, 1)))], 0.0) == NOTHING
