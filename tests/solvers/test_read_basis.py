"""A stream's basis by what readers lose: never worse than principal components, and they where nothing tells more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dotresize_fx.errors import UsageError
from dotresize_fx.gram import RegionStatistics
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.solvers.pca import solve_pca
from dotresize_fx.solvers.read_basis import solve_read_basis

STREAM = Region("s", RegionKind.RESIDUAL, Symmetry.ORTHOGONAL, 6, (), ())


def loss(statistics: RegionStatistics, down: torch.Tensor) -> float:
    out = torch.eye(6, dtype=torch.float64) - down @ down.T
    return sum(float(torch.trace(out @ moment @ out @ metric)) for moment, metric in statistics.sights)


def seen(seed: int = 0) -> RegionStatistics:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(2, 6, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    sights = [(x @ x.T, w @ w.T) for x, w in parts]
    return RegionStatistics(10, torch.stack([moment for moment, _ in sights]).mean(0), sights=sights)


@pytest.mark.parametrize("seed", range(4))
def test_readers_lose_less_than_by_principal_components(seed: int) -> None:
    statistics = seen(seed)
    found = solve_read_basis(STREAM, statistics, 4)
    torch.testing.assert_close(found.down.T @ found.down, torch.eye(4, dtype=torch.float64))
    assert loss(statistics, found.down) < loss(statistics, solve_pca(STREAM, statistics, 4).down)


def test_a_direction_that_nothing_reads_goes_first() -> None:
    """The largest of the stream, and read by nothing."""
    moment = torch.diag(torch.tensor([9.0, 5, 4, 3, 2, 1], dtype=torch.float64))
    metric = torch.diag(torch.tensor([0.0, 1, 1, 1, 1, 1], dtype=torch.float64))
    # Not quite along an axis: at a saddle the gradient says nothing.
    turn = torch.linalg.qr(torch.eye(6, dtype=torch.float64) + 0.1 * torch.ones(6, 6, dtype=torch.float64).tril()).Q
    statistics = RegionStatistics(10, turn @ moment @ turn.T, sights=[(moment, metric)])
    found = solve_read_basis(STREAM, statistics, 5)
    assert float(found.down[0].norm()) < 0.1


def test_principal_components_where_nothing_else_is_known() -> None:
    bare = replace(seen(), sights=())
    assert torch.equal(solve_read_basis(STREAM, bare, 4).down, solve_pca(STREAM, bare, 4).down)
    assert torch.equal(solve_read_basis(STREAM, seen(), 6).down, solve_pca(STREAM, seen(), 6).down)


def test_a_region_without_rotations_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a region that admits rotations"):
        solve_read_basis(replace(STREAM, symmetry=Symmetry.PERMUTATION), seen(), 4)
