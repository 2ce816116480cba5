"""Which blocks go."""

from __future__ import annotations

import pytest

from dotresize_fx.depth.choice import blocks_to_drop, check_count, pairs_to_merge
from dotresize_fx.errors import UsageError

LIKENESS = [0.2, 0.9, 0.5, 0.9, 0.1]


def test_the_most_alike_from_the_back_forward() -> None:
    assert pairs_to_merge(LIKENESS, [True] * 5, 1) == [3]
    assert pairs_to_merge(LIKENESS, [True] * 5, 3) == [3, 2, 1]
    assert pairs_to_merge(LIKENESS, [True] * 5, 5) == [4, 3, 2, 1, 0]


def test_only_like_is_merged_with_like() -> None:
    assert pairs_to_merge(LIKENESS, [True, False, True, False, True], 2) == [2, 0]
    with pytest.raises(UsageError, match="only 2 blocks are built like the one behind them"):
        pairs_to_merge(LIKENESS, [True, False, True, False, False], 3)
    with pytest.raises(UsageError, match="layer types alternate"):
        pairs_to_merge(LIKENESS, [False] * 5, 1)


def test_baselines() -> None:
    influences = [0.5, 0.1, 0.3, 0.1, 0.4]
    assert blocks_to_drop("drop-last", influences, 2) == [4, 3]
    assert blocks_to_drop("drop-least", influences, 1) == [3]
    assert blocks_to_drop("drop-least", influences, 3) == [3, 2, 1]


@pytest.mark.parametrize("count", [0, -1, 4, 9])
def test_more_blocks_than_there_are(count: int) -> None:
    with pytest.raises(UsageError, match=f"--merge {count}: "):
        check_count(count, 4)
    check_count(3, 4)
