"""Value heads by rank: the curve is what a cut costs, and no other basis costs less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.head_maps import over_heads
from dotresize_fx.region_map import random_rotation
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.solvers.value_rank import solve_value_rank, value_rank_curve

# The roots floor a head's small eigenvalues at 1e-9 of its largest, which is what the curve may be off by; the
# matrices here are conditioned far better.
EXACT = 1e-6


def region(n: int, heads: int) -> Region:
    symmetry = Symmetry.HEADWISE_LINEAR
    return Region("v", RegionKind.VALUE, symmetry, n, ("w",), ("r",), heads=heads, attention="a")


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing


def statistics(x: torch.Tensor, out: int = 12, seed: int = 1) -> RegionStatistics:
    return RegionStatistics(len(x), x.T @ x / len(x), rows(out, x.shape[1], seed))


def apart(found: RegionStatistics, n: int) -> RegionStatistics:
    """The same without correlation between query heads: what the method takes for the truth."""
    blocks = torch.block_diag(*[torch.ones(n, n, dtype=torch.float64)] * (len(found.gram) // n))
    return RegionStatistics(found.tokens, found.gram * blocks, found.reader_weight)


def refit_loss(chosen: Region, found: RegionStatistics, down: torch.Tensor) -> float:
    """Squared output error a token with the best reader of what ``down`` leaves."""
    gram, weight = found.gram, found.reader_weight
    assert weight is not None
    mix = over_heads(chosen, down, len(gram))
    fitted = torch.linalg.lstsq(mix.T @ gram @ mix, mix.T @ gram @ weight.T).solution
    change = mix @ fitted - weight.T
    return float((change * (gram @ change)).sum())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(heads=st.integers(1, 3), n=st.integers(2, 6), data=st.data(), seed=st.integers(0, 99))
def test_the_curve_is_the_loss_and_no_basis_loses_less(heads: int, n: int, data: st.DataObject, seed: int) -> None:
    """One query head a KV head: Eckart and Young's optimum, a head at a time."""
    k = data.draw(st.integers(1, n))
    chosen, found = region(n, heads), apart(statistics(rows(200, heads * n, seed), seed=seed + 1), n)
    loss = refit_loss(chosen, found, solve_value_rank(chosen, found, k).down)
    everything = float(value_rank_curve(chosen, found)[0])
    assert loss == pytest.approx(float(value_rank_curve(chosen, found)[k]), abs=EXACT * everything)
    for other in range(5):
        generator = torch.Generator().manual_seed(other)
        basis = torch.stack([random_rotation(n, generator)[:, :k] for _ in range(heads)])
        assert refit_loss(chosen, found, basis) >= loss - EXACT * everything


@settings(max_examples=25, deadline=None, derandomize=True)
@given(groups=st.integers(2, 3), data=st.data(), seed=st.integers(0, 99))
def test_query_heads_that_share_a_value_head_share_the_best_basis(groups: int, data: st.DataObject, seed: int) -> None:
    """Query heads with one and the same second moment, one basis: optimal again, as the sum of their losses."""
    n, heads = 5, 2
    k = data.draw(st.integers(1, n))
    x = rows(200, n, seed)
    gram = torch.block_diag(*[x.T @ x / len(x)] * (heads * groups))
    chosen = region(n, heads)
    found = RegionStatistics(200, gram, rows(12, len(gram), seed + 1))
    curve = value_rank_curve(chosen, found) / groups  # moments are summed over the group
    loss = refit_loss(chosen, found, solve_value_rank(chosen, found, k).down)
    assert loss == pytest.approx(float(curve[k]), abs=EXACT * float(curve[0]))
    for other in range(5):
        generator = torch.Generator().manual_seed(other)
        basis = torch.stack([random_rotation(n, generator)[:, :k] for _ in range(heads)])
        assert refit_loss(chosen, found, basis) >= loss - EXACT * float(curve[0])


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (2, 1), (2, 3)])
def test_at_full_width_the_map_spans_everything(heads: int, groups: int) -> None:
    chosen, found = region(4, heads), statistics(rows(100, heads * groups * 4, 0))
    full = solve_value_rank(chosen, found, 4)
    torch.testing.assert_close(full.down @ full.down.mT, torch.eye(4, dtype=torch.float64).expand(heads, 4, 4))
    assert float(value_rank_curve(chosen, found)[4]) == 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(heads=st.integers(1, 3), groups=st.integers(1, 3), n=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_curve_falls(heads: int, groups: int, n: int, seed: int) -> None:
    curve = value_rank_curve(region(n, heads), statistics(rows(50, heads * groups * n, seed)))
    assert len(curve) == n + 1
    assert bool((curve[1:] <= curve[:-1]).all())
    assert float(curve[-1]) == 0 < float(curve[0])


def silent(width: int) -> torch.Tensor:
    return torch.zeros(50, width, dtype=torch.float64)


@pytest.mark.parametrize("make", [silent, torch.ones_like, lambda x: x[:1].expand_as(x), lambda x: x[:3]], ids=range(4))
def test_activations_that_say_little(make: object) -> None:
    """Silent, all ones, one row over and over, fewer rows than columns: a basis all the same."""
    full = rows(50, 12, 0)
    x = silent(12) if make is silent else make(full)  # type: ignore[operator]
    chosen, found = region(6, 2), statistics(x)
    for k in (1, 3, 6):
        down = solve_value_rank(chosen, found, k).down
        torch.testing.assert_close(down.mT @ down, torch.eye(k, dtype=torch.float64).expand(2, k, k))
    curve = value_rank_curve(chosen, found)
    assert curve.isfinite().all()
    # One direction at most is used by all but the three rows.
    assert float(curve[3 if len(x) == 3 else 1]) <= max(EXACT * float(curve[0]), 1e-300)
