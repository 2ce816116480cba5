"""Fewer numbers a value head: the rank that loses least of what the attention's reader makes of the mixed values.

Nothing but linear ops stands between a KV head's values and their readers, so every basis is admissible. With C the
second moments of the mixed values, summed over the query heads that share the KV head, and W those heads' columns of
the reader, the best rank-k approximation of W C^(1/2) is the truncated singular value decomposition (Eckart & Young
1936); for V and O by SVD under the input metric see Lin et al. 2025, "MoDeGPT", section 3. Where several query heads
share a KV head this takes each head's reader on all heads' values: a surrogate, exact for one query head a KV head.
Where a gate keeps the numbers apart they are eliminated instead, see :mod:`dotresize_fx.solvers.gated_values`.
"""

from __future__ import annotations

import torch

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region, Symmetry
from dotresize_fx.solvers.gated_values import gated_values_curve, solve_gated_values
from dotresize_fx.solvers.matrix_root import inverse, square_root


def solve_value_rank(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
    """Per KV head the ``width`` leading directions, as orthonormal columns (heads, n, k)."""
    if region.symmetry is Symmetry.PERMUTATION:
        return solve_gated_values(region, statistics, width)
    _, vectors, roots = _decompose(region, statistics)
    # The inverse root takes the leading directions of W C^(1/2) back to the values themselves.
    down = torch.linalg.qr(inverse(roots) @ vectors[..., region.width - width :]).Q
    return RegionMap(down, down.mT)


def value_rank_curve(region: Region, statistics: RegionStatistics) -> torch.Tensor:
    """(n + 1,): squared output error a token at each width, all heads together; float64."""
    if region.symmetry is Symmetry.PERMUTATION:
        return gated_values_curve(region, statistics)
    values, _, _ = _decompose(region, statistics)
    lost = values.clamp_min(0).sum(0).cumsum(0)  # ascending: the first n - k are lost at width k
    return torch.cat([lost.flip(0), lost.new_zeros(1)])


def _decompose(region: Region, statistics: RegionStatistics) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(heads, n) ascending eigenvalues and (heads, n, n) vectors of C^(1/2) W.T W C^(1/2); and C^(1/2)."""
    assert statistics.reader_weight is not None
    heads, n = region.heads, region.width
    groups = len(statistics.gram) // (heads * n)
    weight = statistics.reader_weight.reshape(-1, heads, groups * n)
    blocks = statistics.gram.reshape(heads, groups, n, heads, groups, n)
    moments = torch.einsum("hgahgb->hab", blocks)
    read = torch.einsum("ohga,ohgb->hab", *[weight.reshape(-1, heads, groups, n)] * 2)
    roots = square_root(moments)
    values, vectors = torch.linalg.eigh(roots @ read @ roots)
    return values, vectors, roots
