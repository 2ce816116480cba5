"""Hermitian square roots of second moments, and their inverses, for batches of matrices."""

from __future__ import annotations

import torch

# Of the largest eigenvalue: directions that the activations hardly use.
FLOOR = 1e-9


def square_root(matrix: torch.Tensor) -> torch.Tensor:
    """(..., n, n) Hermitian and positive semidefinite: its square root, small eigenvalues raised to FLOOR."""
    values, vectors = torch.linalg.eigh(matrix)
    tiny = torch.finfo(values.dtype).tiny
    floored = torch.maximum(values, (values[..., -1:] * FLOOR).clamp_min(tiny))
    root: torch.Tensor = (vectors * floored.sqrt()[..., None, :]) @ vectors.mH
    return root


def inverse(root: torch.Tensor) -> torch.Tensor:
    """(..., n, n): the inverse of what :func:`square_root` gave."""
    values, vectors = torch.linalg.eigh(root)
    inverted: torch.Tensor = (vectors / values[..., None, :]) @ vectors.mH
    return inverted
