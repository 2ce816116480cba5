"""The maps that take a region's n dimensions to k, and random admissible and wrong ones for the ratio-0 proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from dotresize_fx.regions import Region, Symmetry


@dataclass(frozen=True)
class RegionMap:
    """x_k = x_n @ down, and x_n is read back as x_k @ up.

    down: (n, k), folds into the writers. ``branch_down`` (n, k) stands in for it on the writers of a gate
    product's linear branch. up: (k, n), folds into the readers; None where ``reader_weights`` gives every reader's
    weight (out, k) outright, as a least-squares refit does. ``reader_biases`` go with them: a reader not named
    keeps its bias. All tensors are float64. ``notes`` are figures for the report.
    """

    down: torch.Tensor
    up: torch.Tensor | None = None
    branch_down: torch.Tensor | None = None
    reader_weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    reader_biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    notes: Mapping[str, float | int | str] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """k."""
        return int(self.down.shape[1])


def selection(support: torch.Tensor, width: int) -> torch.Tensor:
    """The (width, k) matrix with a one where column j takes source ``support[j]``."""
    down = torch.zeros(width, len(support), dtype=torch.float64, device=support.device)
    down[support, torch.arange(len(support), device=support.device)] = 1.0
    return down


def random_admissible_map(region: Region, generator: torch.Generator) -> RegionMap:
    """A random full-rank map that must leave the function unchanged, of condition number at most 4.

    Orthogonal regions get a random rotation; permutation regions a random permutation, times scales between
    1/2 and 2 where the function lets them through (a gate's linear branch; ReLU, both positive).
    """
    n = region.width
    if region.symmetry is Symmetry.ORTHOGONAL:
        rotation = random_rotation(n, generator)
        return RegionMap(rotation, rotation.T)
    permutation = selection(torch.randperm(n, generator=generator), n)
    scale = 2.0 ** (2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1)
    if region.linear_branch:
        signs = 2.0 * torch.randint(0, 2, (n,), generator=generator) - 1
        scaled = permutation * (scale * signs)
        return RegionMap(permutation, (permutation / (scale * signs)).T, branch_down=scaled)
    if region.positive_scale:
        return RegionMap(permutation * scale, (permutation / scale).T)
    return RegionMap(permutation, permutation.T)


def random_wrong_map(region: Region, generator: torch.Generator) -> RegionMap:
    """An invertible, equally well-conditioned map that the region's symmetry does not admit.

    A rotation where only permutations pass, an uneven scaling where only rotations do: if the function does not
    notice, the ratio-0 proof proves nothing.
    """
    n = region.width
    if region.symmetry is Symmetry.ORTHOGONAL:
        scale = 2.0 ** (2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1)
        return RegionMap(torch.diag(scale), torch.diag(1 / scale))
    rotation = random_rotation(n, generator)
    return RegionMap(rotation, rotation.T)


def random_rotation(n: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthogonal (n, n) float64 matrix, Haar-distributed up to signs (QR of a Gaussian)."""
    gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64)
    rotation: torch.Tensor = torch.linalg.qr(gaussian).Q
    return rotation
