"""Diffusion maps and what two of them tell of each other."""

from __future__ import annotations

import math

import pytest
import torch

from dotresize_fx.depth.diffusion_map import diffusion_map
from dotresize_fx.depth.similarity import LEAST_ROWS, neighbour_similarities, similarity
from dotresize_fx.errors import CalibrationError


def ring(count: int = 400, noise: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles (count,), and points (count, 20) on a ring that lies askew."""
    generator = torch.Generator().manual_seed(seed)
    angles = 2 * math.pi * torch.rand(count, generator=generator).double()
    plane = torch.randn(2, 20, generator=generator).double()
    points = torch.stack([angles.cos(), angles.sin()], 1) @ plane
    return angles, points + noise * torch.randn(count, 20, generator=generator).double()


def test_a_ring_is_seen_as_a_ring() -> None:
    """The two leading coordinates of a closed curve are cosine and sine along it (Coifman & Lafon 2006)."""
    angles, points = ring()
    found = diffusion_map(points)
    assert found.shape == (400, 2)
    wave = torch.stack([angles.cos(), angles.sin(), torch.ones(400).double()], 1)
    left = found - wave @ torch.linalg.lstsq(wave, found).solution
    assert float(left.norm() / found.norm()) < 0.35  # drawn unevenly, the ring is not round


def test_turning_scaling_and_moving_points_changes_nothing() -> None:
    _, points = ring(noise=0.1)
    turn = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(1)).double()).Q
    found, other = diffusion_map(points), diffusion_map(3 * points @ turn + 5)
    assert torch.allclose(found.abs(), other.abs(), atol=1e-9 * float(found.abs().max()) + 1e-12)


def test_the_same_is_most_alike_whatever_its_sign() -> None:
    found = diffusion_map(ring(noise=0.1)[1])
    assert similarity(found, found) == pytest.approx(1)
    assert similarity(found, -found) == pytest.approx(1, abs=0.01)


def test_what_is_independent_is_hardly_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(1000, 2, generator=generator).double() for _ in range(2))
    assert similarity(one, other) < 0.05
    assert similarity(one, one + 0.3 * other) > 0.3


def test_the_nearer_neighbour_is_the_more_alike() -> None:
    _, points = ring(512)
    noise = torch.randn(512, 20, generator=torch.Generator().manual_seed(4)).double()
    near, far = neighbour_similarities([points, points + 0.05 * noise, points + 3 * noise])
    assert 0 <= far < near <= 1


def test_too_few_tokens_are_refused() -> None:
    _, points = ring(LEAST_ROWS - 1)
    with pytest.raises(CalibrationError, match="255 calibration tokens say too little"):
        neighbour_similarities([points, points])
