"""Merged rotary pairs: nothing is lost where pairs turn alike and say the same, and never more than by dropping."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.rotary_coherence import coherence
from dotresize_fx.rotary_map import mixes_pairs
from dotresize_fx.solvers.query_key import drop_query_key, query_key_curve, solve_query_key
from dotresize_fx.solvers.rotary_pairs import as_complex, rotary_pairs

TOKENS, WIDTH, LENGTH = 60, 9, 16
FAR = [3.0, 1.0, 0.1]
NEAR = [1.0, 0.9, 0.5, 0.45, 0.2, 0.19]
# The roots floor eigenvalues at 1e-9 of the largest: of what is lost, the square root of that at most.
FLOORED = 1e-4


def region(heads: int, pairs: int) -> Region:
    kind, symmetry = RegionKind.QUERY_KEY, Symmetry.ROTARY_PAIRS
    return Region("qk", kind, symmetry, 2 * pairs, ("q", "k"), (), heads=heads, key_writers=("k",))


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turns(angles: list[float], length: int) -> torch.Tensor:
    turned = torch.arange(length)[:, None] * torch.tensor(angles, dtype=torch.float64)
    return torch.polar(torch.ones_like(turned), turned)


def statistics(
    angles: list[float], heads: int = 1, groups: int = 1, seed: int = 0, length: int = LENGTH
) -> RegionStatistics:
    """Of random inputs and writers, all in one causal sequence's distances."""
    x, n = torch.cat([normal(TOKENS, WIDTH, seed=seed), torch.ones(TOKENS, 1)], 1), 2 * len(angles)
    writers = {
        "q": normal(heads * groups * n, WIDTH + 1, seed=seed + 1),
        "k": normal(heads * n, WIDTH + 1, seed=seed + 2),
    }
    near = coherence(turns(angles, length), torch.ones(length, length, dtype=torch.bool).tril())
    return RegionStatistics(TOKENS, torch.zeros(0), None, x.T @ x / TOKENS, writers, coherence=near)


def scores(found: RegionStatistics, turned: torch.Tensor, heads: int, chosen: RegionMap | None = None) -> torch.Tensor:
    """(heads, tokens, distances): what each token's query makes of its own key, were it so far behind."""
    x = torch.linalg.cholesky(found.entry_gram).T
    sides = [(x @ found.writer_weights[name].T).view(len(x), heads, -1).transpose(0, 1) for name in ("q", "k")]
    if chosen is not None:
        assert chosen.key_down is not None
        assert chosen.pairs is not None
        sides = [side @ down for side, down in zip(sides, (chosen.down, chosen.key_down), strict=True)]
        turned = turned[:, chosen.pairs]
    query, key = (torch.complex(*side.chunk(2, -1)) for side in sides)
    # The key stands before its query: what turns the product is the conjugate.
    return torch.einsum("htp,dp->htd", query.conj() * key, turned.conj()).real


# -- two pairs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2])
def test_pairs_of_one_angle_that_say_the_same_merge_without_loss(heads: int) -> None:
    angles = [1.0, 0.5, 0.5]
    found = statistics(angles, heads)
    query = found.writer_weights["q"].view(heads, 6, -1)
    query[:, [2, 5]] = 0.5 * query[:, [1, 4]]  # a multiple of pair 1, with other keys
    merged = solve_query_key(region(heads, 3), found, 4)
    assert merged.pairs is not None
    assert merged.pairs.tolist() in ([0, 1], [0, 2])
    before, after = (scores(found, turns(angles, 5), heads, one) for one in (None, merged))
    torch.testing.assert_close(after, before, rtol=0, atol=FLOORED * float(before.abs().max()))
    curve = query_key_curve(region(heads, 3), found)
    assert float(curve[4]) <= FLOORED * float(curve[2])


def test_pairs_of_far_angles_are_as_good_as_dropped() -> None:
    """Over many distances they turn against each other all ways, so that none can stand for another."""
    found = statistics(FAR, length=4000)
    merged = solve_query_key(region(1, 3), found, 4)
    dropped = drop_query_key(region(1, 3), found, 4)
    assert merged.key_down is not None
    assert merged.pairs is not None
    assert dropped.pairs is not None
    assert torch.equal(merged.pairs, dropped.pairs)
    # What counts is the product; distances near zero, where all pairs are alike, leave some coherence.
    product, plain = merged.down[0] @ merged.key_down[0].T, dropped.down @ dropped.down.T
    assert float((product - plain).norm() / plain.norm()) < 0.5


# -- any -------------------------------------------------------------------------------------------

drawn = given(heads=st.integers(1, 3), groups=st.integers(1, 3), kept=st.integers(1, 5), seed=st.integers(0, 99))


@settings(max_examples=15, deadline=None, derandomize=True)
@drawn
def test_merging_loses_less_than_dropping_and_what_it_says(heads: int, groups: int, kept: int, seed: int) -> None:
    found, chosen = statistics(NEAR, heads, groups, seed), region(heads, len(NEAR))
    merged, dropped = (solve(chosen, found, 2 * kept) for solve in (solve_query_key, drop_query_key))
    assert merged.pairs is not None
    assert merged.pairs.tolist() == sorted(set(merged.pairs.tolist()))
    assert merged.down.shape == (heads, 2 * len(NEAR), 2 * kept)
    assert merged.key_down is not None
    assert mixes_pairs(merged.down)
    assert mixes_pairs(merged.key_down)
    lost, plain = (complex_lost(found, heads, one) for one in (merged, dropped))
    assert lost < plain
    pairs = rotary_pairs(chosen, found)
    assert pairs is not None
    assert lost / complex_lost(found, heads, None) == pytest.approx(
        float(merged.notes["scores lost"]), rel=1e-6, abs=1e-9
    )


@settings(max_examples=15, deadline=None, derandomize=True)
@drawn
def test_fitting_never_loses_more_than_merging_alone(heads: int, groups: int, kept: int, seed: int) -> None:
    found, chosen = statistics(NEAR, heads, groups, seed), region(heads, len(NEAR))
    pairs = rotary_pairs(chosen, found)
    assert pairs is not None
    gone = len(NEAR) - kept
    into = pairs.merge_into(torch.arange(kept), torch.zeros(gone, dtype=torch.int64))
    assert into.pairs.tolist() == list(range(kept))
    assert 0 <= into.lost < 1
    assert 0 <= pairs.merge(kept).lost < 1


@settings(max_examples=15, deadline=None, derandomize=True)
@given(heads=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_curve_falls_and_lies_below_that_of_dropping(heads: int, seed: int) -> None:
    found, chosen = statistics(NEAR, heads, 2, seed), region(heads, len(NEAR))
    curve = query_key_curve(chosen, found)
    assert (curve.shape, curve.dtype) == ((2 * len(NEAR) + 1,), torch.float64)
    assert curve.isfinite().all()
    assert bool((curve[1:] <= curve[:-1]).all())
    assert float(curve[-1]) == 0 < float(curve[0])
    pairs = rotary_pairs(chosen, found)
    assert pairs is not None
    energy = pairs.energies()
    # The first pair to go: never more than the cheapest drop. Two numbers make a pair.
    assert float(curve[-3]) <= float(energy.min()) * (1 + 1e-9)
    assert float(curve[-2]) == float(curve[-3])


def test_at_full_width_and_of_unknown_angles_pairs_are_only_chosen() -> None:
    found, chosen = statistics(NEAR, 2), region(2, len(NEAR))
    whole = solve_query_key(chosen, found, 2 * len(NEAR))
    assert torch.equal(whole.down, torch.eye(2 * len(NEAR), dtype=torch.float64))
    unknown = RegionStatistics(TOKENS, found.gram, None, found.entry_gram, found.writer_weights)
    plain, same = solve_query_key(chosen, unknown, 4), drop_query_key(chosen, found, 4)
    assert torch.equal(plain.down, same.down)
    assert plain.key_down is None


def test_queries_keep_their_size_beside_keys() -> None:
    """Weights of a size of their own would be rounded, and refined, otherwise than their neighbours."""
    found, chosen = statistics(NEAR), region(1, len(NEAR))
    found.writer_weights["q"].mul_(100)
    merged = solve_query_key(chosen, found, 8)
    assert merged.key_down is not None
    assert 0.1 < float(merged.down.norm() / merged.key_down.norm()) < 10


@pytest.mark.parametrize("side", ["q", "k", "a head", "a pair", "twins"])
def test_queries_and_keys_that_say_little(side: str) -> None:
    found, chosen = statistics(NEAR, 2), region(2, len(NEAR))
    if side == "a head":
        found.writer_weights["k"][: 2 * len(NEAR)] = 0
    elif side == "a pair":
        found.writer_weights["k"].view(2, 2, len(NEAR), -1)[:, :, 1] = 0
    elif side == "twins":
        for weight in found.writer_weights.values():
            weight[2 * len(NEAR) :] = weight[: 2 * len(NEAR)]
    else:
        found.writer_weights[side].zero_()
    for k in (2, 6, 10):
        solved = solve_query_key(chosen, found, k)
        assert solved.down.isfinite().all()
        assert solved.key_down is None or solved.key_down.isfinite().all()
    assert query_key_curve(chosen, found).isfinite().all()


def complex_lost(found: RegionStatistics, heads: int, chosen: RegionMap | None) -> float:
    """What is minimised, term by term: independent queries and keys as complex numbers; of no map, all there is."""
    half = len(NEAR)
    total = 0.0
    moments = []
    for name in ("q", "k"):
        gram = found.written_gram(name)
        size = len(gram) // heads
        parts = [
            sum(as_complex(gram[i : i + 2 * half, i : i + 2 * half]) for i in range(h * size, (h + 1) * size, 2 * half))
            for h in range(heads)
        ]
        moments.append(torch.stack(parts))
    near = found.coherence
    assert near is not None
    for h in range(heads):
        slots = [(p, torch.zeros(half, half, dtype=torch.complex128)) for p in range(half)]
        for p, matrix in slots:
            matrix[p, p] = 1
        if chosen is not None:
            assert chosen.pairs is not None
            down, key_down = (
                (side if side is not None else chosen.down).expand(heads, -1, -1)[h]
                for side in (chosen.down, chosen.key_down)
            )
            k = chosen.width // 2
            queries, keys = (torch.complex(side[:half, :k], side[:half, k:]) for side in (down, key_down))
            slots += [(p, -queries[:, j, None].conj() * keys[:, j]) for j, p in enumerate(chosen.pairs.tolist())]
        for p, one in slots:
            for q, other in slots:
                total += float((near[q, p] * (one @ moments[1][h] @ other.mH @ moments[0][h]).trace()).real)
    return total
