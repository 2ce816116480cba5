"""over_heads: one head's map, or a map of heads, for all heads of a linear."""

from __future__ import annotations

import pytest
import torch

from dotresize_fx.head_maps import at_dense_width, over_heads
from dotresize_fx.region_map import RegionMap, pair_selection
from dotresize_fx.regions import Region, RegionKind, Symmetry

GENERATOR = torch.Generator().manual_seed(0)


def region(kind: RegionKind, width: int, heads: int = 1) -> Region:
    return Region("r", kind, Symmetry.HEADWISE_LINEAR, width, ("v",), ("o",), heads=heads)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def test_a_basis_per_kv_head_is_shared_by_its_query_heads() -> None:
    value, down = region(RegionKind.VALUE, 4, heads=2), random(2, 4, 3)
    assert torch.equal(over_heads(value, down, 8), torch.block_diag(down[0], down[1]))
    assert torch.equal(over_heads(value, down, 16), torch.block_diag(down[0], down[0], down[1], down[1]))
    up = random(2, 3, 4)
    assert torch.equal(over_heads(value, up, 16), torch.block_diag(up[0], up[0], up[1], up[1]))


def test_one_basis_for_all_heads() -> None:
    down = random(4, 2)
    assert torch.equal(over_heads(region(RegionKind.QUERY_KEY, 4, heads=2), down, 16), torch.block_diag(*[down] * 4))


def test_a_selection_of_kv_heads_takes_whole_heads() -> None:
    down = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    kept = over_heads(region(RegionKind.HEADS, 2, heads=2), down, 12)
    assert torch.equal(torch.arange(12.0, dtype=torch.float64) @ kept, torch.arange(6.0, 12, dtype=torch.float64))


def test_a_map_across_heads() -> None:
    across = random(2, 3, 2, 3)
    value = region(RegionKind.VALUE, 3, heads=2)
    assert torch.equal(over_heads(value, across, 6), across.reshape(6, 6))
    x = random(2, 2, 3)  # KV head, query head, number
    mixed = torch.einsum("iga,iajb->jgb", x, across)
    assert torch.allclose(x.flatten() @ over_heads(value, across, 12), mixed.flatten(), atol=1e-12)


def test_other_regions_keep_their_matrix() -> None:
    down = random(4, 2)
    assert over_heads(region(RegionKind.FFN, 4), down, 4) is down


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="10 is no multiple of 4"):
        over_heads(region(RegionKind.VALUE, 4, heads=2), random(2, 4, 4), 10)
    with pytest.raises(ValueError, match="a map of 3 heads for 2 heads over 2 KV heads"):
        over_heads(region(RegionKind.VALUE, 4, heads=2), random(3, 4, 4), 8)
    with pytest.raises(ValueError, match="for 3 heads over 2 KV heads"):
        over_heads(region(RegionKind.VALUE, 4, heads=2), random(2, 4, 4), 12)


def test_a_narrow_head_in_the_dense_one() -> None:
    x = torch.arange(10.0, 16, dtype=torch.float64)
    chosen, pairs = region(RegionKind.QUERY_KEY, 6), pair_selection(torch.tensor([2, 0]), 6)
    assert (x @ at_dense_width(chosen, pairs, pairs.down)).tolist() == [10, 0, 12, 13, 0, 15]
    ranks = RegionMap(torch.eye(6, dtype=torch.float64)[:, [4, 1]])
    assert (x @ at_dense_width(chosen, ranks, ranks.down)).tolist() == [14, 11, 0, 0, 0, 0]
