"""What each block puts out for the same tokens, and how far it turns the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

# Tokens whose features are kept: the diffusion map takes an eigendecomposition of so many rows a block.
ROWS = 768


@dataclass(frozen=True)
class DepthStatistics:
    """``features``: (rows, width) float64 of each state, the same tokens in each.

    ``influences``: of each block 1 - mean cosine of the stream before and behind it, over all tokens (Men et al. 2024,
    "ShortGPT", section 3).
    """

    features: tuple[torch.Tensor, ...]
    influences: tuple[float, ...]


def depth_statistics(
    states: Iterable[Iterable[torch.Tensor]],
    batches: int,
    *,
    rows: int = ROWS,
    seed: int = 0,
    advanced: Callable[[], None] = lambda: None,
) -> DepthStatistics:
    """``states``: of each of the ``batches`` the real tokens' rows (tokens, width) of the stream before the first block
    and behind each, in order.

    Tokens are drawn at random, as many of each batch as there are. ``advanced`` is called once a batch.
    """
    generator = torch.Generator().manual_seed(seed)
    share = -(-rows // batches)
    kept: list[list[torch.Tensor]] = []
    cosines: list[float] = []
    tokens = 0
    for batch in states:
        before, chosen = None, torch.zeros(0)
        for i, found in enumerate(batch):
            if len(kept) == i:
                kept.append([])
                cosines.append(0.0)
            if before is None:
                chosen = torch.randperm(len(found), generator=generator)[:share].to(found.device)
                tokens += len(found)
            else:
                cosines[i] += float(torch.nn.functional.cosine_similarity(before, found).double().sum())
            kept[i].append(found[chosen].double())
            before = found
        advanced()
    features = tuple(torch.cat(parts)[:rows] for parts in kept)
    return DepthStatistics(features, tuple(1 - cosine / tokens for cosine in cosines[1:]))
