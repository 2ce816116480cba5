"""pca: the span that keeps most of a stream's energy."""

from __future__ import annotations

import pytest
import torch

from dotresize_fx.errors import UsageError
from dotresize_fx.gram import RegionStatistics
from dotresize_fx.region_map import random_rotation
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.solvers.pca import solve_pca

STREAM = Region("stream", RegionKind.RESIDUAL, Symmetry.ORTHOGONAL, 6, ("w",), ("r",))
ROTATION = random_rotation(6, torch.Generator().manual_seed(0))
ENERGY = torch.tensor([9.0, 4.0, 1.0, 0.5, 0.1, 0.0], dtype=torch.float64)
STATISTICS = RegionStatistics(1, ROTATION @ ENERGY.diag() @ ROTATION.T)
# float64 eigenvectors of a 6 x 6 matrix.
EXACT = 1e-12


def test_keeps_the_leading_span() -> None:
    found = solve_pca(STREAM, STATISTICS, 2)
    leading = ROTATION[:, :2]
    torch.testing.assert_close(found.down @ found.down.T, leading @ leading.T, rtol=0, atol=EXACT)
    assert found.up is not None
    assert torch.equal(found.up, found.down.T)


@pytest.mark.parametrize("width", [1, 3, 6])
def test_columns_are_orthonormal(width: int) -> None:
    found = solve_pca(STREAM, STATISTICS, width)
    torch.testing.assert_close(found.down.T @ found.down, torch.eye(width, dtype=torch.float64), rtol=0, atol=EXACT)


def test_loses_the_least_energy() -> None:
    down = solve_pca(STREAM, STATISTICS, 3).down
    kept = (down.T @ STATISTICS.gram @ down).trace()
    assert float(kept) == pytest.approx(14.0, abs=EXACT * 100)
    for seed in range(1, 21):  # 0 made the stream itself
        other = random_rotation(6, torch.Generator().manual_seed(seed))[:, :3]
        assert (other.T @ STATISTICS.gram @ other).trace() < kept


def test_a_silent_stream_gives_a_basis_all_the_same() -> None:
    silent = RegionStatistics(1, torch.zeros(6, 6, dtype=torch.float64))
    down = solve_pca(STREAM, silent, 3).down
    torch.testing.assert_close(down.T @ down, torch.eye(3, dtype=torch.float64), rtol=0, atol=EXACT)


def test_a_region_that_only_permutes_is_refused() -> None:
    ffn = Region("block.mlp", RegionKind.FFN, Symmetry.PERMUTATION, 6, ("w",), ("r",))
    with pytest.raises(UsageError, match=r"block\.mlp admits permutations only"):
        solve_pca(ffn, STATISTICS, 2)
