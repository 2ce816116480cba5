"""Queries and keys: the pairs, or the directions, that the scores miss least. Merged pairs: test_rotary_pairs.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.solvers.query_key import query_key_curve, solve_query_key

N, WIDTH = 6, 9  # of a head; of what the writers read


def region(heads: int, *, rotary: bool, n: int = N) -> Region:
    symmetry = Symmetry.ROTARY_PAIRS if rotary else Symmetry.HEADWISE_LINEAR
    return Region("qk", RegionKind.QUERY_KEY, symmetry, n, ("q", "k"), (), heads=heads, key_writers=("k",))


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(x: torch.Tensor, heads: int, groups: int = 1, seed: int = 0) -> RegionStatistics:
    """``x`` (tokens, WIDTH) is what both writers read, biases included."""
    entry = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    weights = {
        "q": normal(heads * groups * N, WIDTH + 1, seed=seed),
        "k": normal(heads * N, WIDTH + 1, seed=seed + 1),
    }
    return RegionStatistics(len(x), torch.zeros(0), None, entry.T @ entry / len(x), weights)


def moments(found: RegionStatistics, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moments (heads, N, N) of queries, over those that share a key head, and of keys; by plain loops."""
    grams = [found.written_gram(name) for name in ("q", "k")]
    query, key = (
        torch.stack(
            [
                sum(
                    (
                        gram[j * N : (j + 1) * N, j * N : (j + 1) * N]
                        for j in range(h * len(gram) // N // heads, (h + 1) * len(gram) // N // heads)
                    ),
                    torch.zeros(N, N, dtype=torch.float64),
                )
                for h in range(heads)
            ]
        )
        for gram in grams
    )
    return query, key


# -- rotary ----------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@given(heads=st.integers(1, 3), groups=st.integers(1, 3), pairs=st.integers(1, N // 2), seed=st.integers(0, 99))
def test_the_pairs_of_the_largest_products(heads: int, groups: int, pairs: int, seed: int) -> None:
    found = statistics(normal(60, WIDTH, seed=seed), heads, groups, seed)
    chosen = region(heads, rotary=True)
    query, key = moments(found, heads)
    half = N // 2
    products = [
        sum(
            float((q[p, p] + q[p + half, p + half]) * (k[p, p] + k[p + half, p + half]))
            for q, k in zip(query, key, strict=True)
        )
        for p in range(half)
    ]
    best = sorted(sorted(range(half), key=lambda p: -products[p])[:pairs])
    down = solve_query_key(chosen, found, 2 * pairs).down
    # Whole pairs, in their order: first all first halves, then the seconds.
    assert down.argmax(0).tolist() == [*best, *(p + half for p in best)]
    assert down.sum() == 2 * pairs
    curve = query_key_curve(chosen, found)
    left_out = sum(product for p, product in enumerate(products) if p not in best)
    assert float(curve[2 * pairs]) == pytest.approx(left_out, rel=1e-9, abs=1e-9 * sum(products))
    assert float(curve[0]) == pytest.approx(sum(products), rel=1e-9)


# -- without a rotary embedding --------------------------------------------------------------------


def scores_lost(query: torch.Tensor, key: torch.Tensor, product: torch.Tensor) -> float:
    """Mean square of q . k - q . product k over independent queries and keys of these second moments."""
    change = torch.eye(len(query), dtype=torch.float64) - product
    return float((change.T @ query @ change @ key).trace())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(heads=st.integers(1, 3), groups=st.integers(1, 2), k=st.integers(1, N - 1), seed=st.integers(0, 99))
def test_no_other_rank_k_product_loses_less_of_the_scores(heads: int, groups: int, k: int, seed: int) -> None:
    found = statistics(normal(60, WIDTH, seed=seed), heads, groups, seed)
    chosen = region(heads, rotary=False)
    solved = solve_query_key(chosen, found, k)
    assert solved.key_down is not None
    query, key = moments(found, heads)
    products = solved.down @ solved.key_down.mT
    losses = [scores_lost(q, c, p) for q, c, p in zip(query, key, products, strict=True)]
    curve = query_key_curve(chosen, found)
    # The roots floor eigenvalues at 1e-9 of the largest: of the energy, the square root of that at most.
    slack = 1e-4 * float(curve[0])
    assert sum(losses) == pytest.approx(float(curve[k]), abs=slack)
    for other in range(10):
        # Near the best one as well as anywhere.
        for size in (1e-2, 1.0):
            nudge = [normal(heads, N, k, seed=seed + 10 * other + i) * size for i in range(2)]
            near = (solved.down + nudge[0]) @ (solved.key_down + nudge[1]).mT
            rival = sum(scores_lost(q, c, p) for q, c, p in zip(query, key, near, strict=True))
            assert rival >= sum(losses) - slack


@settings(max_examples=20, deadline=None, derandomize=True)
@given(heads=st.integers(1, 3), groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_at_full_width_nothing_is_lost(heads: int, groups: int, seed: int) -> None:
    found = statistics(normal(60, WIDTH, seed=seed), heads, groups, seed)
    full = solve_query_key(region(heads, rotary=False), found, N)
    assert full.key_down is not None
    whole = torch.eye(N, dtype=torch.float64).expand(heads, N, N)
    torch.testing.assert_close(full.down @ full.key_down.mT, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rotary", [True, False])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(heads=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_curve_falls_to_nothing(rotary: bool, heads: int, seed: int) -> None:
    curve = query_key_curve(region(heads, rotary=rotary), statistics(normal(40, WIDTH, seed=seed), heads, 2, seed))
    assert len(curve) == N + 1
    assert bool((curve[1:] <= curve[:-1]).all())
    assert float(curve[-1]) == 0 < float(curve[0])


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("side", ["q", "k", "both", "one row"])
def test_queries_and_keys_that_say_little(rotary: bool, side: str) -> None:
    found = statistics(normal(1 if side == "one row" else 40, WIDTH, seed=0), 2)
    for name in ("q", "k") if side == "both" else (side,):
        if name in found.writer_weights:
            found.writer_weights[name].zero_()
    chosen = region(2, rotary=rotary)
    for k in (2, 4, N):
        solved = solve_query_key(chosen, found, k)
        assert solved.down.shape[-2:] == (N, k)
        assert solved.down.isfinite().all()
        assert solved.key_down is None or solved.key_down.isfinite().all()
    assert query_key_curve(chosen, found).isfinite().all()
