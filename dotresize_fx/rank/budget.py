"""Ranks from a budget, as LLM-ROM sets them (arXiv 2312.07046, section 3): the last blocks only, all of them alike."""

from __future__ import annotations

import itertools
from math import floor

from dotresize_fx.errors import UsageError

# Share of all weights to remove -> share of the blocks that are factorised, counted from the last: 8, 12 and 24 of 32
# in the paper, with budgets of 0.60, 0.46 and 0.33. Between and beyond them a straight line, which is ours.
PUBLISHED = ((0.0, 0.0), (0.1, 8 / 32), (0.2, 12 / 32), (0.5, 24 / 32), (1.0, 1.0))


def break_even(rows: int, columns: int) -> int:
    """The largest rank at which two linears hold no more weights, and cost no more MACs, than one (rows, columns)."""
    return rows * columns // (rows + columns)


def budget_rank(budget: float, rows: int, columns: int) -> int:
    """r = floor(budget d1 d2 / (d1 + d2)), the paper's rule: so many of the weights are left; at least 1.

    Raises:
        UsageError: the budget is not above 0, or no rank of this size can be had.
    """
    if budget <= 0:
        raise UsageError(f"a rank budget of {budget:g} leaves nothing: it must be above 0")
    rank = max(1, floor(budget * rows * columns / (rows + columns) + 1e-9))
    if rank > min(rows, columns):
        raise UsageError(
            f"a rank budget of {budget:g} asks for rank {rank} of a linear {rows} x {columns}, which has "
            f"{min(rows, columns)} at most: lower it"
        )
    return rank


def last_blocks(ratio: float, blocks: int) -> tuple[int, float]:
    """(how many of the last blocks, the budget in each) that remove ``ratio``, below 1, of all blocks' weights."""
    share = next(
        low + (high - low) * (ratio - start) / (stop - start)
        for (start, low), (stop, high) in itertools.pairwise(PUBLISHED)
        if ratio <= stop
    )
    count = min(blocks, max(1, round(share * blocks)))
    return count, 1 - ratio * blocks / count
