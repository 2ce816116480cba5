"""Fewer numbers of a value head behind a gate, which keeps them apart: each KV head's own are left out one by one.

A number of a KV head has one column of the reader for every query head that shares it; they go together. Structured
elimination by groups of columns (Kurtić et al. 2023, "ZipLM", equation 3), within each KV head: with H the Gram matrix
of what the reader sees of the head and M = W.T W, W being the head's columns of the reader, leaving out the columns J
costs tr([H^-1]_JJ^-1 M_JJ) of squared output error, and H^-1 and M of the rest follow by one elimination step.
"""

from __future__ import annotations

import torch

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.region_map import RegionMap, selection
from dotresize_fx.regions import Region
from dotresize_fx.solvers.obs import damping


def solve_gated_values(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
    """Per KV head the ``width`` numbers that elimination leaves, in their order: a selection (heads, n, k)."""
    order, _ = _eliminate(region, statistics)
    kept = order[:, region.width - width :].sort(1).values
    down = torch.stack([selection(one, region.width) for one in kept])
    return RegionMap(down, down.mT)


def gated_values_curve(region: Region, statistics: RegionStatistics) -> torch.Tensor:
    """(n + 1,): squared output error a token at each width, all heads together; float64."""
    _, errors = _eliminate(region, statistics)
    return torch.cat([errors.sum(0).cumsum(0).flip(0), errors.new_zeros(1)])


def _eliminate(region: Region, statistics: RegionStatistics) -> tuple[torch.Tensor, torch.Tensor]:
    """(heads, n): each KV head's numbers in the order in which they go, int64, and the error that each adds."""
    assert statistics.reader_weight is not None
    heads, n = region.heads, region.width
    groups = len(statistics.gram) // (heads * n)
    damped = statistics.gram + torch.diag(damping(statistics.gram))
    own = torch.arange(heads, device=damped.device)

    def by_number(matrix: torch.Tensor) -> torch.Tensor:
        """(heads, n, groups, n, groups) of a matrix over all columns, which lie query head by query head."""
        parts = matrix.reshape(heads, groups, n, heads, groups, n)[own, :, :, own]
        return parts.permute(0, 2, 1, 4, 3).contiguous()

    size = n * groups
    inverse = torch.linalg.inv(by_number(damped).view(heads, size, size)).view(heads, n, groups, n, groups)
    products = by_number(statistics.reader_weight.T @ statistics.reader_weight)
    gone = torch.zeros(heads, n, dtype=torch.bool, device=damped.device)
    order, errors = [], []
    for _ in range(n):
        # What is gone has zeros in both; a one keeps its block invertible.
        blocks = inverse.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        blocks = blocks + torch.diag_embed(gone.to(blocks.dtype)[..., None].expand(-1, -1, groups))
        cost = torch.linalg.solve(blocks, products.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2))
        costs = cost.diagonal(dim1=-2, dim2=-1).sum(-1).masked_fill(gone, torch.inf)
        j = costs.argmin(1)
        order.append(j)
        errors.append(costs[own, j])
        rows, among = (matrix[own, j].reshape(heads, groups, size) for matrix in (inverse, products))
        step = torch.linalg.solve(blocks[own, j], rows)
        half = among - 0.5 * products[own, j][own, :, j] @ step  # S.T M + M S - S.T M S in two products
        products.view(heads, size, size).sub_(step.mT @ half + half.mT @ step)
        inverse.view(heads, size, size).sub_(rows.mT @ step)
        gone[own, j] = True
        for matrix in (inverse, products):  # exactly, not up to rounding
            matrix[own, j] = 0
            matrix[own, :, :, j] = 0
    return torch.stack(order, 1), torch.stack(errors, 1)
