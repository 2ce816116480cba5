"""Whole KV heads, each with the query heads that share it: leave out the ones whose loss the others make good best.

Structured elimination by groups of columns (Kurtić et al. 2023, "ZipLM", equation 3): with H the Gram matrix of the
mixed values and W the reader's weight, leaving out the columns J costs tr(W_J [H^-1]_JJ^-1 W_J.T) of squared output
error, and H^-1 and W of the rest follow by one elimination step.
"""

from __future__ import annotations

import torch

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.least_squares import diagonal_raised
from dotresize_fx.region_map import RegionMap, selection
from dotresize_fx.regions import Region
from dotresize_fx.solvers.obs import damping


def solve_kv_heads(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
    """A selection (n, k) of KV heads."""
    order, _ = _eliminate(region, statistics)
    kept = sorted(set(range(region.width)) - set(order[: region.width - width]))
    down = selection(torch.tensor(kept, device=statistics.gram.device), region.width)
    return RegionMap(down, down.T)


def kv_heads_curve(region: Region, statistics: RegionStatistics) -> torch.Tensor:
    """(n + 1,): squared output error a token at each number of KV heads; all is lost with the last. float64."""
    _, errors = _eliminate(region, statistics)
    assert statistics.reader_weight is not None
    everything = ((statistics.reader_weight @ statistics.gram) * statistics.reader_weight).sum()
    return torch.stack([everything, *reversed(errors), torch.zeros_like(everything)])


def _eliminate(region: Region, statistics: RegionStatistics) -> tuple[list[int], list[torch.Tensor]]:
    """(KV heads in the order in which they go, error after each); one stays."""
    assert statistics.reader_weight is not None
    size = len(statistics.gram) // region.width
    weight = statistics.reader_weight.clone()
    with diagonal_raised(statistics.gram, damping(statistics.gram)):
        inverse = torch.linalg.inv(statistics.gram)
    alive, order, errors = list(range(region.width)), [], []
    error = weight.new_zeros(())
    while len(alive) > 1:
        costs, steps = [], []
        for i in range(len(alive)):
            columns = slice(i * size, (i + 1) * size)
            step = torch.linalg.solve(inverse[columns, columns], inverse[columns])
            inner = torch.linalg.solve(inverse[columns, columns], weight[:, columns].T)
            costs.append((weight[:, columns] * inner.T).sum())
            steps.append(step)
        i = int(torch.stack(costs).argmin())
        columns = slice(i * size, (i + 1) * size)
        kept = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
        kept[columns] = False
        weight = (weight - weight[:, columns] @ steps[i])[:, kept]
        inverse = (inverse - inverse[:, columns] @ steps[i])[kept][:, kept]
        error = error + costs[i]
        order.append(alive.pop(i))
        errors.append(error)
    return order, errors
