"""Which blocks go: pairs to merge by their likeness, or blocks to drop, the baselines of every merge."""

from __future__ import annotations

from collections.abc import Sequence

from dotresize_fx.errors import UsageError

# mka and aligned merge a pair into one block; the others drop blocks as they are.
MERGES = ("mka", "aligned")
DROPS = ("drop-last", "drop-least")


def check_count(count: int, blocks: int) -> None:
    """Raises UsageError unless 1 <= count < blocks."""
    if count < 1:
        raise UsageError(f"--merge {count}: at least one block has to go")
    if count >= blocks:
        raise UsageError(f"--merge {count}: the model has {blocks} blocks, of which one at least has to stay")


def pairs_to_merge(similarities: Sequence[float], alike: Sequence[bool], count: int) -> list[int]:
    """Numbers i of the ``count`` pairs (i, i + 1) that are most alike, in the order of merging, from the back forward.

    similarities, alike: one a pair of neighbours; only blocks of one form are ``alike``. Of equals the later pair.

    Raises:
        UsageError: there are not so many pairs of one form.
    """
    allowed = [i for i, same in enumerate(alike) if same]
    if not allowed:
        raise UsageError(
            f"--merge {count}: no block is built like its neighbour (layer types alternate), and only like is merged "
            "with like: use --merge-method drop-last or drop-least"
        )
    if count > len(allowed):
        raise UsageError(
            f"--merge {count}: only {len(allowed)} blocks are built like the one behind them, and only like is merged "
            f"with like: use --merge {len(allowed)} or --merge-method drop-last or drop-least"
        )
    chosen = sorted(allowed, key=lambda i: (similarities[i], i), reverse=True)[:count]
    return sorted(chosen, reverse=True)


def blocks_to_drop(method: str, influences: Sequence[float], count: int) -> list[int]:
    """Numbers of the blocks that ``method`` of DROPS drops, from the back forward; of equals the later one."""
    last_first = range(len(influences) - 1, -1, -1)
    if method == "drop-last":
        return list(last_first)[:count]
    return sorted(sorted(last_first, key=lambda i: influences[i])[:count], reverse=True)
