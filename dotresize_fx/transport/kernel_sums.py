"""The sums over the kernel that Sinkhorn's updates need, fast where that is safe and exact where it is not.

In units of epsilon, with potentials p (rows) and q (columns), an update needs

    row_sums_i = log sum_j b_j exp(q_j - C_ij / epsilon)        and likewise the columns.

The fast way keeps K = exp(p0_i + q0_j - C_ij / epsilon) for a *gauge* (p0, q0) near the current potentials,
so that its entries neither over- nor underflow where they matter, and takes log(K @ (b exp(q - q0))) - p0:
one product a side and iteration instead of a logsumexp. When the potentials have drifted from the gauge, K is
made anew at them (absorption: Schmitzer 2019, "Stabilized sparse scaling algorithms for entropy regularized
transport problems", section 3; Chizat et al. 2018, algorithm 2). The exact way is a logsumexp in K's own
memory; it serves when even one round of updates leaves the gauge's reach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dotresize_fx.transport.problem import Problem


@dataclass(frozen=True)
class Verdict:
    """Can a state be believed, should the gauge move to it, and what are its items' marginal errors."""

    trusted: bool
    stale: bool
    errors: list[float]


class KernelSums:
    """Row and column sums of one problem, through ``buffer`` (B, n, k), which it owns and overwrites."""

    def __init__(self, problem: Problem, buffer: torch.Tensor) -> None:
        self._problem = problem
        self._buffer = buffer
        self._exact = False
        # 709 for float64, 88 for float32. Entries that underflowed, below exp(-range), stay negligible beside
        # a sum as long as both scalings and the marginal's shrinkage are within exp(+-range / 4).
        self._range = math.log(torch.finfo(buffer.dtype).max)
        self.source_gauge = torch.zeros_like(problem.source_mass)
        self.target_gauge = torch.zeros_like(problem.target_mass)

    def absorb(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Make the kernel anew with (source, target), in units of epsilon, as its gauge."""
        self._exact = False
        self.source_gauge, self.target_gauge = source, target
        rows, columns = _shut(source, self._problem.source_empty), _shut(target, self._problem.target_empty)
        _exponent(self._problem, self._buffer, rows, columns).exp_()

    def exact(self) -> KernelSums:
        """Itself, with sums taken by logsumexp until the next ``absorb``."""
        self._exact = True
        return self

    def rows(self, target: torch.Tensor) -> torch.Tensor:
        """(B, n): log sum_j b_j exp(target_j - C_ij / epsilon)."""
        problem = self._problem
        if self._exact:
            result = self._logsumexp(None, target + problem.target_mass.log(), -1)
        else:
            scaling = (target - self.target_gauge).exp_().mul_(problem.target_mass)
            result = _product(self._buffer, scaling, transposed=False).log_().sub_(self.source_gauge)
        return result if problem.source_empty is None else result.masked_fill_(problem.source_empty, 0)

    def columns(self, source: torch.Tensor) -> torch.Tensor:
        """(B, k): log sum_i a_i exp(source_i - C_ij / epsilon)."""
        problem = self._problem
        if self._exact:
            result = self._logsumexp(source + problem.source_mass.log(), None, -2)
        else:
            scaling = (source - self.source_gauge).exp_().mul_(problem.source_mass)
            result = _product(self._buffer, scaling, transposed=True).log_().sub_(self.target_gauge)
        return result if problem.target_empty is None else result.masked_fill_(problem.target_empty, 0)

    def judge(self, source: torch.Tensor, target: torch.Tensor, error: torch.Tensor) -> Verdict:
        """What to make of a state reached with these sums; one wait for the device. ``error`` is (B,)."""
        problem = self._problem
        drift = torch.maximum((source - self.source_gauge).abs().amax(), (target - self.target_gauge).abs().amax())
        # A relaxed marginal is mass * exp(-potential * pull): where it is tiny, its sum underflows first.
        shrinkage = torch.maximum(
            (source * problem.source_pull).abs().amax(), (target * problem.target_pull).abs().amax()
        )
        drifted, shrunk, *errors = torch.cat((drift[None], shrinkage[None], error)).tolist()
        trusted = all(map(math.isfinite, (drifted, shrunk, *errors)))
        trusted = trusted and max(drifted, shrunk) <= self._range / 4
        return Verdict(trusted, stale=drifted > self._range / 10, errors=errors)

    def _logsumexp(self, rows: torch.Tensor | None, columns: torch.Tensor | None, dim: int) -> torch.Tensor:
        work = _exponent(self._problem, self._buffer, rows, columns)
        highest = work.amax(dim, keepdim=True)
        return work.sub_(highest).exp_().sum(dim).log_().add_(highest.squeeze(dim))


def initial_gauge(problem: Problem, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, n) and (B, k): the hard potentials min_j C_ij and min_i (C_ij - them), in units of epsilon.

    The kernel made at them has no entry above 1 and an entry of 1 in every row and every column.
    """
    columns = _shut(torch.zeros_like(problem.target_mass), problem.target_empty)
    source = -_exponent(problem, buffer, None, columns).amax(-1)
    target = -_exponent(problem, buffer, _shut(source, problem.source_empty), None).amax(-2)
    if problem.source_empty is not None:
        source.masked_fill_(problem.source_empty, 0)
    if problem.target_empty is not None:
        target.masked_fill_(problem.target_empty, 0)
    return source, target


def build_plan(problem: Problem, buffer: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """a_i b_j exp(source_i + target_j - C_ij / epsilon), in ``buffer``."""
    rows, columns = source + problem.source_mass.log(), target + problem.target_mass.log()
    return _exponent(problem, buffer, rows, columns).exp_()


def _exponent(
    problem: Problem, out: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None
) -> torch.Tensor:
    """rows_i + columns_j - C_ij / epsilon into ``out``, without another tensor of its size."""
    scale = problem.epsilon.reciprocal().neg().unsqueeze(-1)
    if columns is None:
        torch.mul(problem.cost, scale, out=out)
    else:
        torch.addcmul(columns.unsqueeze(-2), problem.cost, scale, out=out)
    return out if rows is None else out.add_(rows.unsqueeze(-1))


def _shut(potential: torch.Tensor, empty: torch.Tensor | None) -> torch.Tensor:
    """-inf where there is no mass: two empty ends may be so close together that their entry overflows."""
    return potential if empty is None else potential.masked_fill(empty, -math.inf)


def _product(kernel: torch.Tensor, vector: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """(B, n, k) times (B, k), or its transpose times (B, n)."""
    if kernel.shape[0] == 1:
        matrix = kernel[0].mT if transposed else kernel[0]
        return torch.mv(matrix, vector[0]).unsqueeze(0)
    matrix = kernel if transposed else kernel.mT
    # A row vector from the left: on the CPU a column vector from the right is several times slower in bmm.
    return torch.bmm(vector.unsqueeze(1), matrix).squeeze(1)
