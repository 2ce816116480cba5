"""Elimination: exact against one solve, the order it promises, and what it does with neurons that carry nothing."""

from __future__ import annotations

import pytest
import torch

from dotresize_fx.errors import SolverError, UsageError
from dotresize_fx.gram import RegionStatistics
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.solvers import obs
from dotresize_fx.solvers.obs import BLOCK, EIGHTH, damping, eliminate, obs_curve, solve_obs


def problem(n: int = 200, out: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A correlated Gram matrix (n, n) and a reader weight (out, n)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    rows = torch.randn(5 * n, n, generator=generator, dtype=torch.float64) @ mixing
    return rows.T @ rows / len(rows), torch.randn(out, n, generator=generator, dtype=torch.float64)


def refit_error(gram: torch.Tensor, weight: torch.Tensor, gone: torch.Tensor) -> float:
    """Squared output error of the best refit of the kept neurons, damped as elimination is."""
    damped = gram + torch.diag(damping(gram))
    kept = torch.ones(len(gram), dtype=torch.bool)
    kept[gone] = False
    change = weight.T.clone()
    change[kept] -= torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.T)
    return float((change * (damped @ change)).sum())


@pytest.mark.parametrize("count", [1, 31, 32, 90])
def test_the_error_is_that_of_one_solve(count: int) -> None:
    gram, weight = problem()
    found = eliminate(gram, weight, count)
    assert len(found.order.unique()) == count
    # Both are float64 sums over a few thousand products of numbers around one.
    assert float(found.error[-1]) == pytest.approx(refit_error(gram, weight, found.order), rel=1e-8)


def test_the_first_neuron_is_the_cheapest() -> None:
    gram, weight = problem()
    errors = [refit_error(gram, weight, torch.tensor([j])) for j in range(len(gram))]
    assert int(eliminate(gram, weight, 1).order) == min(range(len(gram)), key=errors.__getitem__)


def test_it_beats_dropping_the_smallest() -> None:
    gram, weight = problem()
    smallest = torch.argsort(gram.diagonal().sqrt() * weight.norm(dim=0))[:90]
    assert float(eliminate(gram, weight, 90).error[-1]) < 0.95 * refit_error(gram, weight, smallest)


def test_dead_and_duplicate_neurons_go_first() -> None:
    gram, weight = problem()
    gram[7] = gram[:, 7] = 0.0
    gram[11], gram[:, 11] = gram[12].clone(), gram[:, 12].clone()
    gram[11, 11] = gram[12, 12]
    found = eliminate(gram, weight, 2)
    assert found.error.isfinite().all()
    assert 7 in found.order
    assert {11, 12} & set(found.order.tolist())


def test_nothing_to_eliminate() -> None:
    found = eliminate(*problem(), 0)
    assert len(found.order) == len(found.error) == 0


@pytest.mark.parametrize("wide", [False, True])
def test_costs_that_are_no_numbers_are_an_error(monkeypatch: pytest.MonkeyPatch, wide: bool) -> None:
    """Sums near the largest number there is, whose inverse is none."""
    monkeypatch.setattr(obs, "WIDE", 100 if wide else 10**6)
    monkeypatch.setattr(obs, "GROUPS", 50)
    gram, weight = problem()
    with pytest.raises(SolverError, match="singular"):
        eliminate(gram * 1e306, weight * 1e306, 50)


def test_a_stream_is_refused() -> None:
    gram, weight = problem(16)
    stream = Region("residual stream", RegionKind.RESIDUAL, Symmetry.ORTHOGONAL, 16, ("a",), ("b",))
    with pytest.raises(UsageError, match="residual stream is a residual width"):
        solve_obs(stream, RegionStatistics(10, gram, weight), 8)


def ffn(n: int) -> Region:
    return Region("ffn", RegionKind.FFN, Symmetry.PERMUTATION, n, ("a",), ("b",))


@pytest.mark.parametrize("n", [7, 40, 200])
def test_the_curve_is_the_error_of_each_elimination(n: int) -> None:
    gram, weight = problem(n)
    statistics = RegionStatistics(10, gram, weight)
    curve = obs_curve(ffn(n), statistics)
    assert len(curve) == n + 1
    assert float(curve[n]) == 0
    reached = max(1, n // EIGHTH) if n >= EIGHTH else 1
    for width in {reached, n // 2, n - 1}:
        kept = solve_obs(ffn(n), statistics, width).down.sum(1).bool()
        found = eliminate(gram, weight, n - width)
        assert set(found.order.tolist()) == set((~kept).nonzero().flatten().tolist())
        # The same elimination, cut off elsewhere: whole blocks before it end alike.
        assert float(curve[width]) == pytest.approx(float(found.error[-1]), rel=1e-8)
    known = curve[n // EIGHTH :]
    assert bool((known[1:] <= known[:-1]).all())
    assert bool(curve[: n // EIGHTH].isinf().all())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_neurons_that_say_nothing_or_all_the_same(value: float) -> None:
    _, weight = problem(40)
    found = eliminate(torch.full((40, 40), value, dtype=torch.float64), weight, 35)
    assert len(found.order.unique()) == 35
    assert found.error.isfinite().all()
    # Whatever one of them says, another does; what is lost is damping, of which 40 neurons have 1e-4 each.
    assert float(found.error[-1]) <= 1e-2 * value * float(weight.sum(1).square().sum()) + 1e-90


def test_what_the_curve_eliminated_is_not_eliminated_again() -> None:
    """The order of a longer run begins with that of a shorter one, over the borders of blocks too."""
    n = 5 * BLOCK
    x = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.randn(9, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    region = Region("ffn", RegionKind.FFN, Symmetry.PERMUTATION, n, ("w",), ("r",))
    seen = RegionStatistics(len(x), x.T @ x / len(x), weight)
    obs_curve(region, seen)
    for width in (n - 1, n - BLOCK - 3, n - 2 * BLOCK, n // 2):
        fresh = RegionStatistics(len(x), seen.gram, weight)
        assert torch.equal(solve_obs(region, seen, width).down, solve_obs(region, fresh, width).down)
    assert len(seen.eliminations) == 1


@pytest.mark.parametrize(("at_once", "apart", "worse"), [(2, 0.0, 1.1), (3, 0.0, 1.1), (2, 1.0, 1.01), (3, 1.0, 1.01)])
def test_several_in_a_step_lose_little_more(
    monkeypatch: pytest.MonkeyPatch, at_once: int, apart: float, worse: float
) -> None:
    """What they are said to lose is what one solve says, and hardly more than what one by one loses; most where neurons
    all but follow from each other (``apart`` is what each has of its own). Text's are in benchmarks/elimination.py.
    """
    gram, weight = problem(420)
    gram += apart * torch.eye(420, dtype=torch.float64)
    one_by_one = eliminate(gram, weight, 201)
    monkeypatch.setattr(obs, "WIDE", 420)
    monkeypatch.setattr(obs, "GROUPS", 420 // at_once)
    found = eliminate(gram, weight, 201)
    assert len(found.order) == len(found.order.unique()) == 201
    assert float(found.error[-1]) == pytest.approx(refit_error(gram, weight, found.order), rel=1e-8)
    assert not torch.equal(found.order, one_by_one.order)
    for count in (50, 100, 201):
        assert float(found.error[count - 1]) <= worse * float(one_by_one.error[count - 1])
    assert torch.equal(eliminate(gram, weight, 100).order, found.order[:100])
