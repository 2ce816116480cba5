"""What Sinkhorn solves: costs, masses and strengths, checked, with the batch flattened to one dimension."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from dotresize_fx.errors import SolverError


@dataclass(frozen=True)
class Problem:
    """A checked batch of B problems, with what the updates need derived from it."""

    cost: torch.Tensor  # (B, n, k)
    source_mass: torch.Tensor  # (B, n)
    target_mass: torch.Tensor  # (B, k)
    epsilon: torch.Tensor  # (B, 1)
    source_factor: torch.Tensor  # (B, 1): -rho_a / (rho_a + epsilon)
    target_factor: torch.Tensor
    source_pull: torch.Tensor  # (B, 1): epsilon / rho_a; 0 where the marginal is exact or free
    target_pull: torch.Tensor
    source_free: bool
    relaxed: bool  # a strength is finite and none is 0: a best shift exists
    source_empty: torch.Tensor | None  # (B, n) bool, None where every mass is positive
    target_empty: torch.Tensor | None

    @classmethod
    def of(
        cls,
        cost: torch.Tensor,
        source_mass: torch.Tensor,
        target_mass: torch.Tensor,
        epsilon: torch.Tensor,
        source_relaxation: float,
        target_relaxation: float,
    ) -> Problem:
        """Derive the rest; shapes as the fields'."""

        def factor(strength: float) -> torch.Tensor:
            ones = torch.ones_like(epsilon)
            return -ones if math.isinf(strength) else -strength / (strength + epsilon)

        def pull(strength: float) -> torch.Tensor:
            return epsilon / strength if 0 < strength < math.inf else torch.zeros_like(epsilon)

        def empty(mass: torch.Tensor) -> torch.Tensor | None:
            zero = mass == 0
            return zero if bool(zero.any()) else None

        return cls(
            cost,
            source_mass,
            target_mass,
            epsilon,
            factor(source_relaxation),
            factor(target_relaxation),
            pull(source_relaxation),
            pull(target_relaxation),
            source_free=source_relaxation == 0,
            relaxed=0 < min(source_relaxation, target_relaxation) < math.inf,
            source_empty=empty(source_mass),
            target_empty=empty(target_mass),
        )

    def subset(self, chosen: torch.Tensor) -> Problem:
        """The items at the indices ``chosen`` (int64); copies them."""
        tensors: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: value[chosen] for name, value in tensors.items()})

    def best_shift(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(B, 1): the t that makes the dual largest at (source + t, target - t)."""
        source_total = torch.logsumexp(self.source_mass.log() - source * self.source_pull, -1, keepdim=True)
        target_total = torch.logsumexp(self.target_mass.log() - target * self.target_pull, -1, keepdim=True)
        return (source_total - target_total) / (self.source_pull + self.target_pull)


def checked_problem(
    cost: torch.Tensor,
    source_mass: torch.Tensor | None,
    target_mass: torch.Tensor | None,
    epsilon: float | torch.Tensor,
    source_relaxation: float,
    target_relaxation: float,
    dtype: torch.dtype,
    tolerance: float,
) -> Problem:
    """The problem with its batch flattened to one dim, or a SolverError that says what is wrong with it."""
    if dtype not in (torch.float32, torch.float64):
        raise SolverError(f"sinkhorn: dtype is {dtype}; it computes in torch.float64 or torch.float32")
    if not torch.finfo(dtype).eps <= tolerance < math.inf:
        raise SolverError(
            f"sinkhorn: tolerance {tolerance} is out of reach in {dtype}; give at least {torch.finfo(dtype).eps:.1e}"
        )
    if cost.dim() < 2 or cost.numel() == 0 or cost.is_complex():
        raise SolverError(
            f"sinkhorn: the cost is {cost.dtype} of shape {tuple(cost.shape)}; give a real, non-empty (..., n, k)"
        )
    strengths = {"source_relaxation": source_relaxation, "target_relaxation": target_relaxation}
    for name, strength in strengths.items():
        if not strength >= 0:
            raise SolverError(f"sinkhorn: {name} is {strength}; give 0 (free) to infinity (exact)")
    batch, (rows, columns) = cost.shape[:-2], cost.shape[-2:]
    flat = cost.detach().to(dtype).reshape(-1, rows, columns).contiguous()
    # NaN comes through both ends; isfinite() would need temporaries of the cost's size.
    if not all(math.isfinite(end.item()) for end in torch.aminmax(flat)):
        raise SolverError(
            f"sinkhorn: the cost holds NaN or infinity as {dtype}; look at the activations it was made from"
        )
    source = _mass("source_mass", source_mass, batch, rows, flat)
    target = _mass("target_mass", target_mass, batch, columns, flat)
    if math.isinf(source_relaxation) and math.isinf(target_relaxation):
        totals = source.sum(-1, keepdim=True), target.sum(-1, keepdim=True)
        if bool(((totals[0] - totals[1]).abs() > 1e-6 * totals[0]).any()):
            raise SolverError(
                "sinkhorn: source_mass and target_mass have different totals; scale them to be equal,"
                " or relax a marginal"
            )
        target = target * (totals[0] / totals[1])
    try:
        weight = torch.as_tensor(epsilon, dtype=dtype, device=cost.device).broadcast_to(batch).reshape(-1, 1)
    except RuntimeError as error:
        raise SolverError(f"sinkhorn: epsilon does not fit the cost's leading dims {tuple(batch)}") from error
    if not bool(((weight > 0) & weight.isfinite()).all()):
        raise SolverError("sinkhorn: epsilon must be a finite number above 0")
    return Problem.of(flat, source, target, weight, source_relaxation, target_relaxation)


def _mass(name: str, given: torch.Tensor | None, batch: torch.Size, count: int, like: torch.Tensor) -> torch.Tensor:
    """(B, count) masses, checked."""
    if given is None:
        return like.new_full((like.shape[0], count), 1 / count)
    try:
        mass = given.detach().to(like).broadcast_to(*batch, given.shape[-1]).reshape(-1, count)
    except (RuntimeError, IndexError) as error:
        raise SolverError(
            f"sinkhorn: {name} has shape {tuple(given.shape)}; the cost asks for {(*batch, count)}"
        ) from error
    if not bool((mass.isfinite() & (mass >= 0)).all()) or not bool((mass.sum(-1) > 0).all()):
        raise SolverError(f"sinkhorn: {name} must be finite, not negative, and not all zero")
    return mass
