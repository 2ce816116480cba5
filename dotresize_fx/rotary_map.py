"""Rotary pairs as complex numbers: number p of a head and number p + n/2 are real and imaginary part of one.

What commutes with a rotation of such a pair is multiplication by a complex number. A complex matrix C (half, kept)
that takes pairs z to z C acts on the real numbers (x, y) of a head as [[U, V], [-V, U]], where C = U + iV.
"""

from __future__ import annotations

import torch

# Of the largest entry: what folding and rounding leave of an exact structure.
ROUNDING = 1e-9


def real_matrix(mixing: torch.Tensor) -> torch.Tensor:
    """The (..., n, 2k) float64 matrix that acts on numbers as ``mixing`` (..., n/2, k) complex128 does on pairs."""
    upper = torch.cat([mixing.real, mixing.imag], -1)
    lower = torch.cat([-mixing.imag, mixing.real], -1)
    return torch.cat([upper, lower], -2)


def mixes_pairs(matrix: torch.Tensor) -> bool:
    """Whether a real (..., n, 2k) matrix is a complex one on rotary pairs; n and the last size must be even."""
    if matrix.shape[-1] % 2 or matrix.shape[-2] % 2:
        return False
    (straight, across), (back, again) = (rows.chunk(2, -1) for rows in matrix.chunk(2, -2))
    bound = ROUNDING * float(matrix.abs().max())
    return bool((straight - again).abs().max() <= bound and (across + back).abs().max() <= bound)
