"""The paper's rule for ranks and blocks, at the points that it names and beyond."""

from __future__ import annotations

import pytest

from dotresize_fx.errors import UsageError
from dotresize_fx.rank.budget import break_even, budget_rank, last_blocks


@pytest.mark.parametrize(("ratio", "count", "budget"), [(0.1, 8, 0.60), (0.2, 12, 0.46), (0.5, 24, 0.33)])
def test_the_papers_own_settings(ratio: float, count: int, budget: float) -> None:
    """The paper's budgets are rounded, and its ratios are of all parameters, embeddings too."""
    found = last_blocks(ratio, 32)
    assert found[0] == count
    assert found[1] == pytest.approx(budget, abs=0.01)


@pytest.mark.parametrize("ratio", [0.01, 0.05, 0.15, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("blocks", [2, 6, 30])
def test_what_is_left_adds_up(ratio: float, blocks: int) -> None:
    count, budget = last_blocks(ratio, blocks)
    assert budget > 0
    assert 1 <= count <= blocks
    assert count * (1 - budget) / blocks == pytest.approx(ratio)


def test_ranks() -> None:
    """r = floor(b d1 d2 / (d1 + d2)); LLaMA-7B's attention and FFN at 0.46."""
    assert budget_rank(0.46, 4096, 4096) == 942
    assert budget_rank(0.46, 11008, 4096) == 1373
    assert budget_rank(0.001, 8, 8) == 1
    assert budget_rank(1.0, 4096, 4096) == break_even(4096, 4096) == 2048


@pytest.mark.parametrize("budget", [0.0, -0.5])
def test_a_budget_of_nothing_is_refused(budget: float) -> None:
    with pytest.raises(UsageError, match="above 0"):
        budget_rank(budget, 8, 8)


def test_a_budget_beyond_the_full_rank_is_refused() -> None:
    with pytest.raises(UsageError, match="which has 8 at most"):
        budget_rank(2.5, 8, 8)
