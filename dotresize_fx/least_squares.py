"""Refit a region's reader so that the slim sublayer lands where the dense model's residual stream is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dotresize_fx.gram import GramAccumulator

# Relative to the mean diagonal of the Gram matrix. The pull toward the own-output solution keeps the repair of
# earlier errors from fitting noise; the floor keeps rank-deficient regions solvable.
PULL = 1e-3
# An encoder's: what repair fits of earlier errors to single tokens does not carry over to other text. Measured on one
# (docs/measurements.md); 0.1 and 1 do about as well.
ENCODER_PULL = 0.3
FLOOR = 1e-6


@dataclass(frozen=True)
class Refit:
    """weight: (out, k); bias: (out,) or None; both float64."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def refit_reader(
    gram: torch.Tensor, wanted: torch.Tensor, own: torch.Tensor, *, with_bias: bool, pull: float = PULL
) -> Refit:
    """Ridge regression of ``wanted`` on the kept activations, pulled toward the regression of ``own``.

    minimise ||X V - wanted||² + pull s ||V - V_own||², with V_own = argmin ||X V - own||² + FLOOR s ||V||² and s
    the mean diagonal of X.T X over the activations. ``own`` is what the dense reader makes of the slim model's
    activations, ``wanted`` what it would have to make for the residual stream to be the dense model's.

    gram: (k, k) X.T X; wanted, own: (k, out) X.T Y. With ``with_bias`` the last row and column belong to a
    constant one beside the activations, which is not pulled. All float64. The diagonal of ``gram`` is another for a
    while.
    """
    activations = gram.diagonal()[:-1] if with_bias else gram.diagonal()
    size = activations.mean().clamp_min(torch.finfo(gram.dtype).tiny)
    weights = torch.full((len(gram),), 1.0, dtype=gram.dtype, device=gram.device)
    if with_bias:
        weights[-1] = 1e-9
    with diagonal_raised(gram, FLOOR * size * weights):
        own_solution = solve_positive(gram, own)
    pulled = pull * size * weights
    with diagonal_raised(gram, pulled):
        solution = solve_positive(gram, wanted + pulled[:, None] * own_solution)
    return Refit(solution[:-1].T, solution[-1]) if with_bias else Refit(solution.T, None)


@contextmanager
def diagonal_raised(matrix: torch.Tensor, diagonal: torch.Tensor) -> Iterator[None]:
    """Inside, (n,) is added to the diagonal of (n, n), in place."""
    before = matrix.diagonal().clone()
    matrix.diagonal().add_(diagonal)
    try:
        yield
    finally:
        matrix.diagonal().copy_(before)


def solve_positive(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solve a symmetric positive definite system; one that rounding made indefinite through its eigenvalues."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not failed.item():
        solution: torch.Tensor = torch.cholesky_solve(right, factor)
        return solution
    values, vectors = torch.linalg.eigh(matrix)
    inverse = torch.where(values > values.amax() * 1e-12, 1 / values, 0)
    minimal: torch.Tensor = vectors @ (inverse[:, None] * (vectors.T @ right))
    return minimal


def relative_error(held_out: GramAccumulator, target: str, weight: torch.Tensor) -> float:
    """||X W.T - Y||² / ||Y||² from the held-out Gram matrices; weight: (out, k) with a bias as its last column."""
    gram, cross = held_out.gram, held_out.cross[target]
    error = torch.einsum("ok,kl,ol->", weight, gram, weight) - 2 * (weight.T * cross).sum()
    energy = held_out.energy[target]
    return float(((error + energy) / energy.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0))
