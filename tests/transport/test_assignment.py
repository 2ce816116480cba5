"""Matching by transport: permutations found again, always one to one, near the best sum."""

from __future__ import annotations

import itertools

import pytest
import torch

from dotresize_fx.transport.assignment import assign


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_a_hidden_permutation_is_found(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    rows = torch.randn(n, 16, generator=generator).double()
    order = torch.randperm(n, generator=generator)
    found = assign(rows @ rows[order].T)
    assert torch.equal(order[found], torch.arange(n))


@pytest.mark.parametrize("seed", range(5))
def test_each_column_once_and_the_sum_near_the_best(seed: int) -> None:
    score = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)).double()
    found = assign(score)
    assert sorted(found.tolist()) == list(range(6))
    best = max(sum(float(score[i, j]) for i, j in enumerate(one)) for one in itertools.permutations(range(6)))
    assert float(score[torch.arange(6), found].sum()) > best - 0.15 * abs(best)


@pytest.mark.parametrize("score", [torch.zeros(4, 4), torch.ones(3, 3)])
def test_nothing_to_tell_them_apart(score: torch.Tensor) -> None:
    assert sorted(assign(score.double()).tolist()) == list(range(len(score)))
