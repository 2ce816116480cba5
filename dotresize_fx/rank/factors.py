"""A linear of rank r as two: the basis from what it puts out, or from what it should put out.

As published (LLM-ROM, arXiv 2312.07046, section 2): V the r leading eigenvectors of Y.T Y, Y = X W.T; the two weights
are V.T W and V. Since |Y - Y V V.T| is the least of any rank r, this is also the best factorisation of W in the metric
of its own inputs. Ours is reduced-rank regression (Izenman 1975) of wanted outputs: both sides centred, a bias for the
means, and X what the reduced prefix feeds, while the outputs wanted are the dense model's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dotresize_fx.gram import GramAccumulator
from dotresize_fx.least_squares import solve_positive

# Of the mean square of a centred input: how strongly the fit is held to the linear's own weight.
PULL = 1e-3


@dataclass(frozen=True)
class Factors:
    """``second @ first`` stands for a weight (out, in).

    first: (r, in); second: (out, r); bias: (out,) or None; all float64.
    """

    first: torch.Tensor
    second: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return len(self.first)

    @property
    def product(self) -> torch.Tensor:
        """(out, in)."""
        return self.second @ self.first


def solve_rom(weight: torch.Tensor, bias: torch.Tensor | None, sums: GramAccumulator, rank: int) -> Factors:
    """As published: eigenvectors of the uncentred second moments of the outputs, biases among them.

    weight: (out, in), bias: (out,) or None; ``sums`` over the inputs with a constant one behind them, (in + 1, in + 1).
    """
    weight = weight.double()
    shift = weight.new_zeros(len(weight)) if bias is None else bias.double()
    whole = torch.cat([weight, shift[:, None]], 1)
    basis = leading_outputs(whole, sums.gram, rank)
    return Factors(basis.T @ weight, basis, None if bias is None else basis @ (basis.T @ shift))


def solve_reduced_rank(
    weight: torch.Tensor, bias: torch.Tensor | None, sums: GramAccumulator, rank: int, pull: float = PULL
) -> Factors:
    """Reduced-rank regression of what the linear puts out and ``sums.cross["missing"]`` (in + 1, out), what is wanted
    beyond it; means kept exactly.

    With x and y centred, V minimises |X V - Y|² + pull s |V - W.T|², s the mean square of x; of X V the ``rank``
    leading directions are kept. Arguments as for :func:`solve_rom`. Nothing missing, V is W.T to the last bit.
    """
    weight = weight.double()
    mean_x, missing = sums.gram[-1, :-1] / sums.tokens, sums.cross["missing"]
    mean_y = weight @ mean_x + missing[-1] / sums.tokens + (0.0 if bias is None else bias.double())
    gram = sums.gram[:-1, :-1] - sums.tokens * torch.outer(mean_x, mean_x)
    size = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    pulled = pull * size * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    fitted = weight.T + solve_positive(gram + pulled, missing[:-1] - torch.outer(mean_x, missing[-1]))
    basis = leading_outputs(fitted.T, gram, rank)
    first = basis.T @ fitted.T
    return Factors(first, basis, mean_y - basis @ (first @ mean_x))


def output_spectrum(weight: torch.Tensor, sums: GramAccumulator) -> torch.Tensor:
    """(min(out, in),) float64, falling: the eigenvalues of the second moments of what the linear puts out, centred.

    Those behind the first r are what :func:`solve_reduced_rank` leaves undone where nothing is missing.
    """
    mean = sums.gram[-1, :-1] / sums.tokens
    gram = sums.gram[:-1, :-1] - sums.tokens * torch.outer(mean, mean)
    weight = weight.double()
    if weight.shape[0] > weight.shape[1]:
        weight, gram = _root(gram).T, weight.T @ weight  # the other way round the same eigenvalues, and fewer zeros
    values: torch.Tensor = torch.linalg.eigvalsh(weight @ gram @ weight.T).clamp_min(0).flip(0)
    return values


def leading_outputs(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> torch.Tensor:
    """(out, rank), orthonormal: the leading eigenvectors of weight @ gram @ weight.T.

    weight: (out, in), gram: (in, in), both float64. More outputs than inputs lie in as many directions as there are
    inputs, which the eigenvectors of an (in, in) matrix say.
    """
    if len(weight) <= len(gram) or rank > len(gram):
        return leading(weight @ gram @ weight.T, rank)
    half = weight @ _root(gram)
    basis: torch.Tensor = torch.linalg.qr(half @ leading(half.T @ half, rank)).Q
    return basis


def _root(gram: torch.Tensor) -> torch.Tensor:
    """(n, n) R with R @ R.T = gram, which is positive semidefinite up to rounding."""
    values, vectors = torch.linalg.eigh(gram)
    root: torch.Tensor = vectors * values.clamp_min(0).sqrt()
    return root


def leading(moments: torch.Tensor, rank: int) -> torch.Tensor:
    """(n, rank): the eigenvectors of the largest eigenvalues of a symmetric (n, n)."""
    vectors: torch.Tensor = torch.linalg.eigh(moments).eigenvectors
    return vectors[:, len(vectors) - rank :].flip(1)
