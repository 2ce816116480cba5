"""Numbers of value heads behind a gate: those go, and cost, what exact least squares says."""

from __future__ import annotations

import pytest
import torch

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.solvers.obs import DAMPING
from dotresize_fx.solvers.value_rank import solve_value_rank, value_rank_curve

# Damping of each moment, which the condition of these small matrices magnifies.
CLOSE = 100 * DAMPING


def statistics(columns: int) -> RegionStatistics:
    generator = torch.Generator().manual_seed(0)
    mixing, rows, weight = (
        torch.randn(count, columns, generator=generator, dtype=torch.float64) for count in (columns, 50, 7)
    )
    x = rows @ mixing
    return RegionStatistics(len(x), x.T @ x / len(x), weight)


def loss(found: RegionStatistics, head: list[int], kept: list[int]) -> float:
    """Squared output error of one head's columns once the best reader of the kept ones stands in for theirs."""
    assert found.reader_weight is not None
    gram, weight = found.gram[head][:, head], found.reader_weight[:, head]
    error = weight.clone()
    if kept:
        error[:, kept] -= weight @ gram[:, kept] @ torch.linalg.inv(gram[kept][:, kept])
    return float((error @ gram * error).sum())


@pytest.mark.parametrize(("heads", "n", "groups"), [(2, 5, 2), (3, 4, 1), (1, 3, 3)])
def test_greedy_by_exact_losses(heads: int, n: int, groups: int) -> None:
    region = Region("v", RegionKind.VALUE, Symmetry.PERMUTATION, n, ("w", "g"), ("r",), heads=heads, attention="a")
    found = statistics(heads * groups * n)
    curve = value_rank_curve(region, found)
    assert curve.shape == (n + 1,)
    assert curve[n] == 0
    for k in range(n, -1, -1):
        lost = 0.0
        for h in range(heads):
            head = [(h * groups + g) * n + j for g in range(groups) for j in range(n)]
            gone: list[int] = []
            for _ in range(n - k):
                costs = {
                    j: loss(found, head, [i for i in range(len(head)) if i % n not in {*gone, j}])
                    for j in range(n)
                    if j not in gone
                }
                gone.append(min(costs, key=lambda j: costs[j]))
            lost += loss(found, head, [i for i in range(len(head)) if i % n not in gone])
            if k:
                down = solve_value_rank(region, found, k).down[h]
                assert down.sum(1).nonzero().flatten().tolist() == [j for j in range(n) if j not in gone]
        assert float(curve[k]) == pytest.approx(lost, rel=CLOSE, abs=1e-9)
