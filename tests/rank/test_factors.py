"""Factors of a linear: exact at full rank, better with each rank, and what centring and wanted outputs bring."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotresize_fx.gram import GramAccumulator, with_ones
from dotresize_fx.rank.factors import Factors, leading_outputs, output_spectrum, solve_reduced_rank, solve_rom

TOKENS = 200


def drawn(seed: int, rows: int = 7, columns: int = 5) -> tuple[torch.Tensor, ...]:
    """(inputs with means that are not zero, weight, bias, wanted outputs near the linear's own), float64."""
    generator = torch.Generator().manual_seed(seed)
    x, mixed = (torch.randn(count, columns, generator=generator).double() for count in (TOKENS, columns))
    x = x @ mixed + 1.5
    weight, bias = torch.randn(rows, columns, generator=generator), torch.randn(rows, generator=generator)
    own = x @ weight.double().T + bias
    return x, weight, bias, own + 0.3 * torch.randn(TOKENS, rows, generator=generator)


def summed(x: torch.Tensor, missing: torch.Tensor | None = None) -> GramAccumulator:
    sums = GramAccumulator()
    sums.add(with_ones(x)) if missing is None else sums.add(with_ones(x), missing=missing)
    return sums


def off(factors: Factors, x: torch.Tensor, wanted: torch.Tensor) -> float:
    put_out = x @ factors.product.T + (0.0 if factors.bias is None else factors.bias)
    return float((put_out - wanted).square().sum() / wanted.square().sum())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(2, 9), columns=st.integers(2, 9))
def test_the_error_falls_with_the_rank(seed: int, rows: int, columns: int) -> None:
    x, weight, bias, wanted = drawn(seed, rows, columns)
    own = x @ weight.double().T + bias
    ranks = range(1, min(rows, columns) + 1)
    published = [off(solve_rom(weight, bias, summed(x), r), x, own) for r in ranks]
    sums = summed(x, wanted - own)  # held to the linear's own weight, a fit gives some of the error away
    ours = [off(solve_reduced_rank(weight, bias, sums, r, pull=1e-9), x, wanted) for r in ranks]
    for errors in (published, ours):
        assert all(b <= a + 1e-6 for a, b in itertools.pairwise(errors))


def test_published_factors_of_full_rank_are_the_linear() -> None:
    x, weight, bias, _ = drawn(0)
    found = solve_rom(weight, bias, summed(x), 7)
    assert torch.allclose(found.product, weight.double(), atol=1e-12)
    assert found.bias is not None
    assert torch.allclose(found.bias, bias.double(), atol=1e-12)


def test_ours_of_full_rank_is_the_linear_where_it_is_what_is_wanted() -> None:
    x, weight, bias, _ = drawn(0)
    found = solve_reduced_rank(weight, bias, summed(x, torch.zeros(TOKENS, 7).double()), 7)
    assert torch.allclose(found.product, weight.double(), atol=1e-12)
    assert found.bias is not None
    assert torch.allclose(found.bias, bias.double(), atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_mean_costs_no_rank(rank: int) -> None:
    """Outputs with a large mean: published factors spend a direction on it, a bias does not."""
    x, weight, bias, _ = drawn(1)
    own = x @ weight.double().T + bias
    ours = solve_reduced_rank(weight, bias, summed(x, torch.zeros_like(own)), rank)
    assert off(ours, x, own) < off(solve_rom(weight, bias, summed(x), rank), x, own)


def test_wanted_outputs_are_met_better_than_by_the_linears_own_directions() -> None:
    x, weight, bias, _ = drawn(2)
    turned = x @ torch.randn(7, 5, generator=torch.Generator().manual_seed(9)).double().T
    ours = solve_reduced_rank(weight, bias, summed(x, turned - x @ weight.double().T - bias), 2)
    assert off(ours, x, turned) < 0.5 * off(solve_rom(weight, bias, summed(x), 2), x, turned)


def test_no_bias_is_made_up_as_published() -> None:
    x, weight, _, _ = drawn(0)
    assert solve_rom(weight, None, summed(x), 2).bias is None


@pytest.mark.parametrize(("rows", "columns"), [(9, 4), (4, 9), (6, 6)])
@pytest.mark.parametrize("seen", [3, 50])
def test_directions_and_spectrum_are_those_of_the_outputs(rows: int, columns: int, seen: int) -> None:
    """Of more outputs than inputs the smaller matrix is decomposed; of few tokens some inputs are in no direction."""
    x, weight, _, _ = drawn(3, rows, columns)
    x, weight = x[:seen], weight.double()
    rank = min(rows, columns) - 1
    basis = leading_outputs(weight, x.T @ x, rank)
    assert torch.allclose(basis.T @ basis, torch.eye(rank).double(), atol=1e-10)
    values, vectors = torch.linalg.eigh(weight @ x.T @ x @ weight.T)
    known = vectors[:, -min(rank, seen) :]  # behind these nothing is put out
    assert torch.allclose(basis @ (basis.T @ known), known, atol=1e-7)
    centred = (x - x.mean(0)) @ weight.T
    expected = torch.linalg.eigvalsh(centred.T @ centred).flip(0)[: min(rows, columns)]
    assert torch.allclose(output_spectrum(weight, summed(x)), expected.clamp_min(0), atol=1e-9 * float(values[-1]))
