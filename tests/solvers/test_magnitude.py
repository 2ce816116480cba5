"""magnitude: the neurons of the largest activation norm are kept, nothing else happens."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.solvers.magnitude import solve_magnitude, top


def ffn(width: int) -> Region:
    return Region("ffn", RegionKind.FFN, Symmetry.PERMUTATION, width, ("w",), ("r",))


def statistics(norms: list[float]) -> RegionStatistics:
    squares = torch.tensor(norms, dtype=torch.float64).square()
    return RegionStatistics(1, squares.diag())


def test_keeps_the_largest() -> None:
    found = solve_magnitude(ffn(4), statistics([1, 9, 0, 3]), 2)
    assert found.down.argmax(0).tolist() == [1, 3]
    assert torch.equal(found.down.sum(0), torch.ones(2, dtype=torch.float64))
    assert found.up is not None
    assert torch.equal(found.up, found.down.T)


def test_full_width_is_the_identity() -> None:
    found = solve_magnitude(ffn(4), statistics([1, 9, 0, 3]), 4)
    assert torch.equal(found.down, torch.eye(4, dtype=torch.float64))


def test_ties_go_to_the_lower_index() -> None:
    assert top(torch.tensor([2.0, 5.0, 2.0, 2.0]), 2).tolist() == [0, 1]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(scores=st.lists(st.floats(0, 9), min_size=1, max_size=12), data=st.data())
def test_nothing_left_out_is_larger(scores: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(scores)))
    kept = top(torch.tensor(scores, dtype=torch.float64), count).tolist()
    assert kept == sorted(set(kept))
    assert len(kept) == count
    out = [score for i, score in enumerate(scores) if i not in kept]
    assert min(scores[i] for i in kept) >= max(out, default=0)
