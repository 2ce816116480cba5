"""Fewer numbers a query and key head: rotary pairs merged or dropped, or a rank where none rotates.

How pairs are merged is in :mod:`dotresize_fx.solvers.rotary_pairs`. Where nothing is known of how they turn they are
dropped: a rotary pair's share of the scores is bounded by the product of the norms of its query and its key (the choice
of Lin et al. 2025, "MoDeGPT", section 3), summed over all heads. One set of pairs serves a whole layer, as the tables
of the rotary embedding and fused attentions want it. Without a rotary embedding a KV head's scores q.k allow any
basis D on queries and its inverse transpose on keys; with Cq and Ck their second moments, the best k dimensions are
the leading singular directions of Cq^(1/2) Ck^(1/2).
"""

from __future__ import annotations

import torch

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.region_map import RegionMap, pair_selection
from dotresize_fx.regions import Region, Symmetry
from dotresize_fx.solvers.magnitude import top
from dotresize_fx.solvers.matrix_root import inverse, square_root
from dotresize_fx.solvers.rotary_pairs import merged_map, rotary_pairs, score_moments


def solve_query_key(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
    """Rotary pairs merged (heads, n, k), or a basis per KV head (heads, n, k); with a counterpart for the keys."""
    pairs = rotary_pairs(region, statistics)
    if pairs is None or width == region.width:
        return drop_query_key(region, statistics, width)
    return merged_map(region, statistics, pairs.merge(width // 2))


def drop_query_key(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
    """The same without merging: a selection of rotary pairs (n, k)."""
    if region.symmetry is Symmetry.ROTARY_PAIRS:
        return pair_selection(top(_pair_scores(region, statistics), width // 2), region.width)
    left, values, right, query_root, key_root = _decompose(region, statistics)
    scale = values[:, None, :width].clamp_min(values[:, :1, None] * 1e-12).sqrt()
    return RegionMap(
        inverse(query_root) @ left[..., :width] * scale, key_down=inverse(key_root) @ right[..., :width] * scale
    )


def query_key_curve(region: Region, statistics: RegionStatistics) -> torch.Tensor:
    """(n + 1,): share of the scores' energy that is lost at each width, in the units of the moments; float64."""
    pairs = rotary_pairs(region, statistics)
    if pairs is not None:
        lost = pairs.curve()[:-1].flip(0).repeat_interleave(2).to(statistics.gram.device)
    elif region.symmetry is Symmetry.ROTARY_PAIRS:
        lost = _pair_scores(region, statistics).sort().values.cumsum(0).repeat_interleave(2)
    else:
        _, values, _, _, _ = _decompose(region, statistics)
        lost = values.square().sum(0).flip(0).cumsum(0)
    return torch.cat([lost.flip(0), lost.new_zeros(1)])


def _pair_scores(region: Region, statistics: RegionStatistics) -> torch.Tensor:
    sides = (side.diagonal(dim1=-2, dim2=-1) for side in score_moments(region, statistics))
    query, key = (side.reshape(len(side), 2, -1).sum(1) for side in sides)
    scores: torch.Tensor = (query * key).sum(0)
    return scores


def _decompose(region: Region, statistics: RegionStatistics) -> tuple[torch.Tensor, ...]:
    query_root, key_root = (square_root(side) for side in score_moments(region, statistics))
    left, values, right = torch.linalg.svd(query_root @ key_root)
    return left, values, right.mT, query_root, key_root
