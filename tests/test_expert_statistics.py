"""Experts: each is solved on the rows that were routed to it, and one that saw few is told from its weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dotresize_fx.expert_statistics import (
    ExpertGrams,
    expert_statistics,
    experts_error,
    per_expert,
    per_expert_curve,
    refit_experts,
)
from dotresize_fx.gram import PANEL_STEP, RegionStatistics
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.solvers.obs import obs_curve, solve_obs

EXPERTS, N, OUT = 3, 8, 4
REGION = Region("experts", RegionKind.EXPERTS, Symmetry.PERMUTATION, N, ("up",), ("down",), heads=EXPERTS)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grams(ends: list[int], real: torch.Tensor | None = None) -> ExpertGrams:
    sums = ExpertGrams(EXPERTS)
    sums.add_routed(drawn(ends[-1], N), torch.tensor(ends), real)
    return sums


def test_rows_go_to_their_expert_and_padding_to_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PANEL_STEP, "cpu", 2)  # four panels of each matrix
    x, real = drawn(30, N), torch.ones(30, dtype=torch.bool)
    real[[0, 12, 29]] = False
    sums = grams([10, 10, 30], real)
    assert sums.counts.tolist() == [9, 0, 18]
    torch.testing.assert_close(sums.gram[0], x[1:10].T @ x[1:10])
    assert not sums.gram[1].any()
    sums.add_routed(x, torch.tensor([10, 10, 30]), real)
    torch.testing.assert_close(sums.gram[0], 2 * x[1:10].T @ x[1:10])


def test_where_all_see_all_rows_those_that_were_sent_elsewhere_do_not_count() -> None:
    x, real = drawn(EXPERTS, 10, N), torch.ones(10, dtype=torch.bool)
    real[9] = False
    x[1, 2:] = 0  # what a score of 0 makes of a row
    sums = ExpertGrams(EXPERTS)
    sums.add_of_all(x, real)
    assert sums.counts.tolist() == [9, 2, 9]
    assert sums.tokens == 20
    torch.testing.assert_close(sums.gram[0], x[0, :9].T @ x[0, :9])
    torch.testing.assert_close(sums.gram[1], x[1].T @ x[1])


def test_an_expert_is_an_ffn_of_its_own() -> None:
    statistics = expert_statistics(grams([20, 40, 60]), drawn(EXPERTS, OUT, N, seed=1))
    assert statistics.reader_weight is not None
    found = per_expert(solve_obs)(REGION, statistics, 5)
    alone = replace(REGION, kind=RegionKind.FFN)
    for expert in range(EXPERTS):
        part = RegionStatistics(60, statistics.gram[expert], statistics.reader_weight[expert])
        assert torch.equal(found.down[expert], solve_obs(alone, part, 5).down)
    assert not found.notes


def test_the_curve_is_the_sum_of_all() -> None:
    statistics = expert_statistics(grams([20, 40, 60]), drawn(EXPERTS, OUT, N, seed=1))
    curve = per_expert_curve(obs_curve)(REGION, statistics)
    assert curve.shape == (N + 1,)
    assert curve[N] == 0
    assert bool((curve[2:].diff() <= 0).all())


def test_one_that_saw_nothing_keeps_what_its_reader_weighs_most() -> None:
    """And the report says how many there were."""
    weight = drawn(EXPERTS, OUT, N, seed=1)
    found = per_expert(solve_obs)(REGION, expert_statistics(grams([20, 20, 60]), weight), 5)
    kept = found.down[1].sum(1).bool()
    norms = weight[1].norm(dim=0)
    assert norms[kept].min() > norms[~kept].max()
    assert list(found.notes.values()) == [1]


def test_a_refit_makes_the_best_of_what_is_left() -> None:
    statistics = expert_statistics(grams([20, 40, 60]), weight := drawn(EXPERTS, OUT, N, seed=1))
    found = per_expert(solve_obs)(REGION, statistics, 6)
    dropped = experts_error(statistics.gram, weight @ found.down @ found.down.mT, weight)
    fitted = refit_experts(found, statistics.gram, weight, ridge=1e-9)
    assert experts_error(statistics.gram, fitted @ found.down.mT, weight) < 0.9 * dropped
    for noise in (drawn(*fitted.shape, seed=2), -drawn(*fitted.shape, seed=3)):
        worse = experts_error(statistics.gram, (fitted + 1e-2 * noise) @ found.down.mT, weight)
        assert worse > experts_error(statistics.gram, fitted @ found.down.mT, weight)


def test_nothing_at_all_is_still_a_number() -> None:
    statistics = expert_statistics(grams([1, 1, 1]), torch.zeros(EXPERTS, OUT, N, dtype=torch.float64))
    found = per_expert(solve_obs)(REGION, statistics, 3)
    assert found.down.sum().item() == EXPERTS * 3
    error = experts_error(statistics.gram, torch.zeros(EXPERTS, OUT, N, dtype=torch.float64), statistics.reader_weight)  # type: ignore[arg-type]
    assert error == pytest.approx(0)
