"""KV heads: the one that is missed least goes first, and what is missed is what least squares says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.solvers.kv_heads import kv_heads_curve, solve_kv_heads
from dotresize_fx.solvers.obs import damping


def region(heads: int) -> Region:
    return Region("h", RegionKind.HEADS, Symmetry.PERMUTATION, heads, ("w",), ("r",), heads=heads, attention="a")


def statistics(heads: int, size: int, seed: int = 0) -> RegionStatistics:
    generator = torch.Generator().manual_seed(seed)
    width = heads * size
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(10 * width, width, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(7, width, generator=generator, dtype=torch.float64)
    return RegionStatistics(len(x), x.T @ x / len(x), weight)


def loss(found: RegionStatistics, gone: list[int], size: int) -> float:
    """Squared output error of the best refit without these heads, damped as elimination is."""
    weight = found.reader_weight
    assert weight is not None
    damped = found.gram + torch.diag(damping(found.gram))
    kept = torch.ones(len(damped), dtype=torch.bool)
    for head in gone:
        kept[head * size : (head + 1) * size] = False
    change = weight.T.clone()
    change[kept] -= torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.T)
    return float((change * (damped @ change)).sum())


def kept_heads(found: RegionStatistics, heads: int, k: int) -> list[int]:
    down = solve_kv_heads(region(heads), found, k).down
    assert bool((down.sum(0) == 1).all())
    kept = down.argmax(0).tolist()
    assert kept == sorted(set(kept))
    return kept


@settings(max_examples=25, deadline=None, derandomize=True)
@given(heads=st.integers(2, 5), size=st.integers(1, 4), seed=st.integers(0, 99))
def test_each_step_is_the_best_single_removal_at_its_true_cost(heads: int, size: int, seed: int) -> None:
    found = statistics(heads, size, seed)
    curve = kv_heads_curve(region(heads), found)
    gone: list[int] = []
    for k in range(heads - 1, 0, -1):
        losses = {head: loss(found, [*gone, head], size) for head in range(heads) if head not in gone}
        best = min(losses, key=losses.__getitem__)
        gone.append(best)
        assert kept_heads(found, heads, k) == [head for head in range(heads) if head not in gone]
        # float64 solves of matrices of condition 1e6 or less.
        assert float(curve[k]) == pytest.approx(losses[best], rel=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(heads=st.integers(1, 5), size=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_curve_falls_from_everything_to_nothing(heads: int, size: int, seed: int) -> None:
    found = statistics(heads, size, seed)
    assert found.reader_weight is not None
    curve = kv_heads_curve(region(heads), found)
    assert len(curve) == heads + 1
    assert bool((curve[2:] <= curve[1:-1]).all())
    # The curve's inner points carry the damping, 1e-4 of each neuron's moment; its start does not.
    assert float(curve[0]) >= float(curve[1]) * (1 - 1e-3)
    assert float(curve[-1]) == 0
    assert float(curve[0]) == pytest.approx(float(((found.reader_weight @ found.gram) * found.reader_weight).sum()))


def test_at_full_width_all_stay() -> None:
    assert kept_heads(statistics(4, 3), 4, 4) == [0, 1, 2, 3]


def test_a_copy_of_another_head_goes_first() -> None:
    heads, size = 4, 3
    found = statistics(heads, size)
    copy = torch.eye(heads * size, dtype=torch.float64)
    copy[3:6, 3:6], copy[9:12, 3:6] = 0, torch.eye(3)  # x @ copy: head 1 is head 3
    found = RegionStatistics(found.tokens, copy.T @ found.gram @ copy, found.reader_weight)
    kept = kept_heads(found, heads, 3)
    assert len({1, 3} & set(kept)) == 1
    curve = kv_heads_curve(region(heads), found)
    assert float(curve[3]) <= 1e-3 * float(curve[2])  # nothing but damping is lost


@pytest.mark.parametrize("of", ["silence", "ones", "one silent head"])
def test_heads_that_say_little(of: str) -> None:
    found = statistics(3, 2)
    gram = found.gram.clone()
    if of == "one silent head":
        gram[2:4] = 0
        gram[:, 2:4] = 0
    else:
        gram = torch.zeros_like(gram) if of == "silence" else torch.ones_like(gram)
    found = RegionStatistics(9, gram, found.reader_weight)
    assert kv_heads_curve(region(3), found).isfinite().all()
    kept = kept_heads(found, 3, 2)
    assert len(kept) == 2
    assert of != "one silent head" or kept == [0, 2]
