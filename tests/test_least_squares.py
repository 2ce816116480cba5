"""refit_reader against numpy-style least squares on the rows themselves, and where the numbers are degenerate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotresize_fx.gram import GramAccumulator
from dotresize_fx.least_squares import FLOOR, PULL, Refit, refit_reader, relative_error


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def refit(x: torch.Tensor, wanted: torch.Tensor, own: torch.Tensor, *, with_bias: bool, pull: float = PULL) -> Refit:
    if with_bias:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return refit_reader(x.T @ x, x.T @ wanted, x.T @ own, with_bias=with_bias, pull=pull)


def joined(found: Refit) -> torch.Tensor:
    """(k or k + 1, out): the solution as one matrix."""
    return found.weight.T if found.bias is None else torch.cat([found.weight.T, found.bias[None]])


def by_rows(x: torch.Tensor, y: torch.Tensor, ridge: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """argmin ||X V - Y||² + sum of ridge (V - centre)², with the ridge as rows of their own: no Gram matrix."""
    roots = ridge.sqrt().diag()
    return torch.linalg.lstsq(torch.cat([x, roots]), torch.cat([y, roots @ centre]), driver="gelsd").solution


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    k=st.integers(1, 6),
    out=st.integers(1, 4),
    count=st.integers(1, 30),
    with_bias=st.booleans(),
    pull=st.sampled_from([1e-4, PULL, 1.0]),
    seed=st.integers(0, 99),
)
def test_minimises_the_ridge_objective(k: int, out: int, count: int, with_bias: bool, pull: float, seed: int) -> None:
    """Also with fewer rows than neurons, where only the ridge decides."""
    x, wanted, own = rows(count, k, seed), rows(count, out, seed + 1), rows(count, out, seed + 2)
    found = joined(refit(x, wanted, own, with_bias=with_bias, pull=pull))
    ridge = torch.ones(k, dtype=torch.float64)
    if with_bias:
        x = torch.cat([x, torch.ones(count, 1, dtype=torch.float64)], 1)
        ridge = torch.cat([ridge, torch.tensor([1e-9], dtype=torch.float64)])
    size = (x.T @ x).diagonal()[:k].mean()  # the constant beside the activations has no say
    centre = by_rows(x, own, FLOOR * size * ridge, torch.zeros(len(ridge), out, dtype=torch.float64))
    expected = by_rows(x, wanted, pull * size * ridge, centre)
    # Gram matrices with a ridge of 1e-6 have condition 1e7 at most here: float64 leaves eight digits or more.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_more_pull_stays_nearer_to_the_own_output() -> None:
    x, wanted, own = rows(50, 5, 0), rows(50, 3, 1), rows(50, 3, 2)
    alone = joined(refit(x, own, own, with_bias=False))
    distances = [
        float((joined(refit(x, wanted, own, with_bias=False, pull=pull)) - alone).norm())
        for pull in (0.01, 1, 100, 1e6)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] <= 1e-4 * distances[0]


def test_a_bias_takes_up_a_constant_error() -> None:
    x = rows(50, 5, 0)
    weight = rows(5, 3, 1)
    shift = torch.tensor([5.0, -7.0, 0.5], dtype=torch.float64)
    found = refit(x, x @ weight + shift, x @ weight, with_bias=True)
    assert found.bias is not None
    # The pull of 1e-3 acts on the weight alone, whose solution is the same for both targets.
    torch.testing.assert_close(found.bias, shift, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.weight.T, weight, rtol=1e-3, atol=1e-3)
    assert refit(x, x @ weight, x @ weight, with_bias=False).bias is None


@pytest.mark.parametrize("with_bias", [False, True])
def test_degenerate_activations_give_finite_weights(with_bias: bool) -> None:
    wanted = rows(20, 3, 1)
    twin = rows(20, 1, 0)
    cases = {
        "all dead": torch.zeros(20, 4, dtype=torch.float64),
        "one dead": torch.cat([rows(20, 3, 0), torch.zeros(20, 1, dtype=torch.float64)], 1),
        "constant": torch.ones(20, 4, dtype=torch.float64),
        "twins": torch.cat([twin, twin, twin, twin], 1),
        "huge and tiny": rows(20, 4, 0) * torch.tensor([1e8, 1.0, 1e-8, 1e-16], dtype=torch.float64),
    }
    for name, x in cases.items():
        found = joined(refit(x, wanted, wanted, with_bias=with_bias))
        assert torch.isfinite(found).all(), name
        with_one = torch.cat([x, torch.ones(20, 1, dtype=torch.float64)], 1) if with_bias else x
        # No worse than predicting nothing, up to the floor.
        assert (with_one @ found - wanted).norm() <= wanted.norm() * (1 + 1e-3), name


def test_twins_share_their_weight() -> None:
    twin, wanted = rows(40, 1, 0), rows(40, 2, 1)
    found = refit(torch.cat([twin, twin], 1), wanted, wanted, with_bias=False)
    torch.testing.assert_close(found.weight[:, 0], found.weight[:, 1], rtol=1e-6, atol=1e-9)


def test_relative_error_is_that_of_the_rows() -> None:
    x, y, weight = rows(30, 4, 0), rows(30, 3, 1), rows(3, 4, 2)
    held_out = GramAccumulator()
    held_out.add(x, wanted=y)
    expected = float((x @ weight.T - y).square().sum() / y.square().sum())
    assert relative_error(held_out, "wanted", weight) == pytest.approx(expected, rel=1e-10)


def test_relative_error_of_a_perfect_fit_is_zero_not_negative() -> None:
    x, weight = rows(30, 4, 0), rows(3, 4, 2)
    held_out = GramAccumulator()
    held_out.add(x, wanted=x @ weight.T)
    assert 0 <= relative_error(held_out, "wanted", weight) <= 1e-12
    silent = GramAccumulator()
    silent.add(x, wanted=torch.zeros(30, 3, dtype=torch.float64))
    assert relative_error(silent, "wanted", torch.zeros(3, 4, dtype=torch.float64)) == 0
