"""Diffusion maps: points seen by how easily a random walk gets from one to another (Coifman & Lafon 2006)."""

from __future__ import annotations

import torch

# As MKA's authors set them (arXiv 2406.16330 and its code): the exponent of the density that is divided out, and the
# number of coordinates. The width of their kernel is a fixed 8; the stream's size grows with the depth, so here it is
# the median distance: a reconstruction.
DENSITY, COORDINATES = 0.5, 2


def diffusion_map(points: torch.Tensor, coordinates: int = COORDINATES, density: float = DENSITY) -> torch.Tensor:
    """(rows, coordinates) float64: eigenvectors of the walk's transitions, times their eigenvalues, but for the
    constant one.

    points: (rows, width). The kernel is exp(-|x - y|² / 2 s²), s the median distance of two points; it is divided by
    the density to the power of ``density`` on both sides and normalised to transitions.
    """
    points = points.double()
    distances = torch.cdist(points, points)
    off = ~torch.eye(len(points), dtype=torch.bool, device=points.device)
    width = distances[off].median().clamp_min(torch.finfo(torch.float64).tiny)
    kernel = (-(distances / width).square() / 2).exp()
    mass = kernel.sum(1) ** density
    kernel = kernel / mass[:, None] / mass[None, :]
    root = kernel.sum(1).sqrt()
    values, vectors = torch.linalg.eigh(kernel / root[:, None] / root[None, :])
    chosen = slice(len(points) - 1 - coordinates, len(points) - 1)  # the last is the constant one
    found: torch.Tensor = (vectors[:, chosen] / root[:, None] * values[chosen]).flip(1)
    return found
