"""Elimination: exact against one solve, the order it promises, and what it does with neurons that carry nothing."""

from __future__ import annotations

import pytest
import torch

from dotresize_fx.errors import UsageError
from dotresize_fx.gram import RegionStatistics
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.solvers.obs import damping, eliminate, solve_obs


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


def test_a_stream_is_refused() -> None:
    gram, weight = problem(16)
    stream = Region("residual stream", RegionKind.RESIDUAL, Symmetry.ORTHOGONAL, 16, ("a",), ("b",))
    with pytest.raises(UsageError, match="residual stream is a residual width"):
        solve_obs(stream, RegionStatistics(10, gram, weight), 8)
