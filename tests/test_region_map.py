"""Maps: random admissible ones are well conditioned and keep to their symmetry, wrong ones do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotresize_fx.head_maps import over_heads
from dotresize_fx.region_map import (
    RegionMap,
    pair_selection,
    random_admissible_map,
    random_rotation,
    random_wrong_map,
    selection,
)
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.rotary_map import mixes_pairs

# Orthonormal to float64 rounding for the sizes drawn here.
EXACT = 1e-12


def region(symmetry: Symmetry, width: int, *, gate: bool = False, relu: bool = False) -> Region:
    kind = RegionKind.RESIDUAL if symmetry is Symmetry.ORTHOGONAL else RegionKind.FFN
    branch = ("up",) if gate else ()
    return Region("r", kind, symmetry, width, ("gate", "up"), ("down",), linear_branch=branch, positive_scale=relu)


REGIONS = {
    "stream": lambda n: region(Symmetry.ORTHOGONAL, n),
    "plain ffn": lambda n: region(Symmetry.PERMUTATION, n),
    "gated ffn": lambda n: region(Symmetry.PERMUTATION, n, gate=True),
    "relu ffn": lambda n: region(Symmetry.PERMUTATION, n, relu=True),
}
names_widths_seeds = given(name=st.sampled_from(sorted(REGIONS)), n=st.integers(1, 24), seed=st.integers(0, 999))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= EXACT)


def test_a_selection_takes_its_support() -> None:
    down = selection(torch.tensor([3, 0]), 4)
    x = torch.tensor([[10.0, 11.0, 12.0, 13.0]], dtype=torch.float64)
    assert torch.equal(x @ down, torch.tensor([[13.0, 10.0]], dtype=torch.float64))
    assert RegionMap(down).width == 2


@settings(max_examples=40, deadline=None, derandomize=True)
@names_widths_seeds
def test_admissible_maps_undo_themselves_and_are_well_conditioned(name: str, n: int, seed: int) -> None:
    found = random_admissible_map(REGIONS[name](n), torch.Generator().manual_seed(seed))
    assert found.width == n
    assert found.up is not None
    carried = found.down if found.branch_down is None else found.branch_down
    assert close(carried @ found.up, torch.eye(n, dtype=torch.float64))
    for matrix in (found.down, found.up, carried):
        assert matrix.dtype is torch.float64
        assert torch.linalg.cond(matrix) <= 4 + EXACT


@settings(max_examples=40, deadline=None, derandomize=True)
@names_widths_seeds
def test_admissible_maps_keep_to_their_symmetry(name: str, n: int, seed: int) -> None:
    found = random_admissible_map(REGIONS[name](n), torch.Generator().manual_seed(seed))
    if name == "stream":
        assert close(found.down.T @ found.down, torch.eye(n, dtype=torch.float64))
        return
    for matrix in (found.down, found.branch_down):
        if matrix is not None:
            assert torch.equal((matrix != 0).sum(0), torch.ones(n, dtype=torch.int64))
            assert torch.equal((matrix != 0).sum(1), torch.ones(n, dtype=torch.int64))
    assert (found.branch_down is not None) == (name == "gated ffn")
    scales = found.down.sum(0)
    if name == "relu ffn":
        assert bool(((scales >= 0.5) & (scales <= 2)).all())
    else:
        assert close(scales, torch.ones(n, dtype=torch.float64))


@pytest.mark.parametrize("name", REGIONS)
def test_maps_are_drawn_from_the_generator(name: str) -> None:
    first, again, other = (
        random_admissible_map(REGIONS[name](16), torch.Generator().manual_seed(seed)).up for seed in (1, 1, 2)
    )
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(REGIONS)), n=st.integers(3, 24), seed=st.integers(0, 999))
def test_wrong_maps_are_invertible_and_leave_the_symmetry(name: str, n: int, seed: int) -> None:
    wrong = random_wrong_map(REGIONS[name](n), torch.Generator().manual_seed(seed))
    identity = torch.eye(n, dtype=torch.float64)
    assert wrong.up is not None
    assert close(wrong.down @ wrong.up, identity)
    assert torch.linalg.cond(wrong.down) <= 4 + EXACT
    if name == "stream":
        assert not close(wrong.down.T @ wrong.down, identity)
    else:
        assert bool(((wrong.down.abs() > 1e-6).sum(0) > 1).any())


def test_rotations_are_orthogonal() -> None:
    rotation = random_rotation(16, torch.Generator().manual_seed(0))
    assert close(rotation.T @ rotation, torch.eye(16, dtype=torch.float64))


def heads(kind: RegionKind, width: int, number: int, *, rotary: bool = False) -> Region:
    symmetry = Symmetry.ROTARY_PAIRS if rotary else Symmetry.HEADWISE_LINEAR
    symmetry = Symmetry.PERMUTATION if kind is RegionKind.HEADS else symmetry
    keys = () if kind is RegionKind.VALUE else ("k",)
    return Region("r", kind, symmetry, width, ("q", "k"), ("o",), heads=number, key_writers=keys)


HEAD_REGIONS = {
    "value": lambda n, m: heads(RegionKind.VALUE, n, m),
    "query_key": lambda n, m: heads(RegionKind.QUERY_KEY, n, m),
    "rotary": lambda n, m: heads(RegionKind.QUERY_KEY, n, m, rotary=True),
    "kv_heads": lambda n, m: heads(RegionKind.HEADS, m, m),
}
names_sizes_seeds = given(
    name=st.sampled_from(sorted(HEAD_REGIONS)), half=st.integers(2, 6), m=st.integers(2, 5), seed=st.integers(0, 999)
)


def met(region: Region, found: RegionMap) -> torch.Tensor:
    """What stands between the two sides when a map is undone: the identity where it is."""
    share = 2 * region.heads * (1 if region.kind is RegionKind.HEADS else region.width)
    down = over_heads(region, found.down, share)
    if found.up is not None:
        return down @ over_heads(region, found.up, share)
    assert found.key_down is not None
    return down @ over_heads(region, found.key_down, share).T


@settings(max_examples=40, deadline=None, derandomize=True)
@names_sizes_seeds
def test_admissible_maps_of_heads(name: str, half: int, m: int, seed: int) -> None:
    region = HEAD_REGIONS[name](2 * half, m)
    found = random_admissible_map(region, torch.Generator().manual_seed(seed))
    assert found.width == region.width
    assert close(met(region, found), torch.eye(2 * m * (1 if name == "kv_heads" else 2 * half), dtype=torch.float64))
    for matrix in (found.down, found.up, found.key_down):
        assert matrix is None or bool((torch.linalg.cond(matrix) <= 4 + EXACT).all())
    if name == "rotary":
        assert found.pairs is not None
        assert sorted(found.pairs.tolist()) == list(range(half))
        assert not torch.equal(found.pairs, torch.arange(half))
        assert mixes_pairs(found.down)
        size = found.down[:, :half, :half].square() + found.down[:, half:, :half].square()
        # One pair each, turned and scaled by every head on its own.
        assert torch.equal((size > 0).double().argmax(1), found.pairs.expand(m, half))
        assert torch.equal((size > 0).sum(1), torch.ones(m, half, dtype=torch.int64))
        assert not close(found.down[0], found.down[1])


@settings(max_examples=40, deadline=None, derandomize=True)
@names_sizes_seeds
def test_wrong_maps_of_heads(name: str, half: int, m: int, seed: int) -> None:
    region = HEAD_REGIONS[name](2 * half, m)
    wrong = random_wrong_map(region, torch.Generator().manual_seed(seed))
    assert wrong.width == region.width
    identity = torch.eye(2 * m * (1 if name == "kv_heads" else 2 * half), dtype=torch.float64)
    assert close(met(region, wrong), identity)  # undone where it should be: only the symmetry is broken
    if name == "kv_heads":
        assert wrong.key_down is not None
        assert not close(wrong.key_down, wrong.down)
    elif name == "rotary":
        assert wrong.pairs is not None
        assert torch.equal(wrong.pairs, torch.arange(half))
        assert mixes_pairs(wrong.down)  # which the checks let through: what was turned otherwise is mixed in
        assert bool((wrong.down[:, 0, 1:half].abs().amax(-1) > 1e-3).all())
    else:
        assert wrong.down.shape == (m, 2 * half, m, 2 * half)
        assert float(wrong.down[0, :, 1].abs().max()) > 1e-3


def test_of_a_single_head_the_wrong_map_is_not_undone() -> None:
    region = HEAD_REGIONS["value"](4, 1)
    wrong = random_wrong_map(region, torch.Generator().manual_seed(0))
    assert not close(met(region, wrong), torch.eye(8, dtype=torch.float64))


def test_pairs_are_taken_in_order() -> None:
    found = pair_selection(torch.tensor([2, 0]), 6)
    assert found.down.argmax(0).tolist() == [2, 0, 5, 3]
    assert found.pairs is not None
    assert found.pairs.tolist() == [2, 0]


def test_of_a_single_pair_the_wrong_map_is_a_phase_that_keys_keep() -> None:
    wrong = random_wrong_map(HEAD_REGIONS["rotary"](2, 3), torch.Generator().manual_seed(0))
    assert mixes_pairs(wrong.down)
    assert not close(met(HEAD_REGIONS["rotary"](2, 3), wrong), torch.eye(12, dtype=torch.float64))
