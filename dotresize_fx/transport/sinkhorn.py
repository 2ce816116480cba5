"""Entropic optimal transport: Sinkhorn's algorithm on potentials, batched, on the CPU or CUDA.

``sinkhorn`` is the only entry point. The iteration lives on log potentials throughout; how the sums over
the kernel are taken (a product, or a logsumexp where that could lose digits) is in ``transport_kernel``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dotresize_fx.errors import SolverError
from dotresize_fx.transport.kernel_sums import KernelSums, Verdict, build_plan, initial_gauge
from dotresize_fx.transport.problem import Problem, checked_problem

__all__ = ["TransportPlan", "sinkhorn"]


@dataclass(frozen=True)
class TransportPlan:
    """What ``sinkhorn`` found, in its dtype and on the cost's device; ``...`` are the cost's leading dims.

    ``plan`` (..., n, k) is ``a_i b_j exp((f_i + g_j - C_ij) / epsilon)`` with ``source_potential`` f (..., n)
    and ``target_potential`` g (..., k) in units of the cost; where a mass is zero, the potential is 0.
    ``iterations`` (..., int64) counts pairs of updates, ``marginal_error`` (...) is what stopped them (see
    ``sinkhorn``) and ``converged`` (..., bool) says whether it came down to the tolerance.
    """

    plan: torch.Tensor
    source_potential: torch.Tensor
    target_potential: torch.Tensor
    iterations: torch.Tensor
    marginal_error: torch.Tensor
    converged: torch.Tensor


@torch.no_grad()
def sinkhorn(
    cost: torch.Tensor,
    source_mass: torch.Tensor | None = None,
    target_mass: torch.Tensor | None = None,
    *,
    epsilon: float | torch.Tensor,
    source_relaxation: float = math.inf,
    target_relaxation: float = math.inf,
    tolerance: float = 1e-9,
    max_iterations: int = 10_000,
    dtype: torch.dtype = torch.float64,
    check_every: int = 5,
) -> TransportPlan:
    """Minimise over plans P >= 0 of shape (n, k), for every item of the batch on its own,

        <C, P> + epsilon KL(P | a b') + rho_a KL(P 1 | a) + rho_b KL(P' 1 | b),
        KL(x | y) = sum x log(x / y) - x + y.

    A relaxation strength rho of infinity (the default) makes that marginal exact, 0 leaves it free, anything
    between pulls it towards the given mass. Both infinite is balanced transport (Cuturi 2013; Peyré & Cuturi
    2019, chapter 4), both finite unbalanced (Chizat et al. 2018), one of each semi-relaxed. The reference
    measure is a b', as in Séjourné et al. 2019 (and POT's ``reg_type="kl"``); with two exact marginals the
    plain entropy of P in its place gives the same plan. The updates, with l = rho / (rho + epsilon), are

        f_i = -l_a epsilon log sum_j b_j exp((g_j - C_ij) / epsilon),   g_j the same from f, with l_b.

    A relaxed problem also moves (f, g) to (f + t, g - t) with the best t (Séjourné, Vialard & Peyré 2022,
    "Faster unbalanced optimal transport"): without it that direction settles only at the rate l_a l_b.

    Args:
        cost: (..., n, k), real and finite; leading dims are independent problems (layers). Nothing is
            differentiated through.
        source_mass: a, (..., n) or broadcast over the leading dims, >= 0, not all zero; None is 1/n each.
            Entries of zero are allowed and get a zero row.
        target_mass: b, (..., k), likewise. With two exact marginals the totals must agree to 1e-6 relative,
            and b is rescaled to a's total.
        epsilon: > 0, in units of the cost; one number, or a tensor of the leading dims' shape.
        source_relaxation: rho_a >= 0, in units of the cost.
        target_relaxation: rho_b >= 0, likewise.
        tolerance: an item stops once its ``marginal_error`` is at most this. After each g update the target's
            condition holds exactly, so the error is the source's: sum |P 1 - a exp(-f / rho_a)| / sum P. For
            an exact source this is the L1 violation of its marginal as a share of the mass; a free source
            has none.
        max_iterations: where it stops without having converged; the result says so, nothing is raised.
        dtype: ``torch.float64`` or ``torch.float32`` to compute and answer in.
        check_every: iterations between looks at the error; each look waits for the device.

    Raises:
        SolverError: a cost, mass, epsilon, strength, shape or option that cannot be worked with.
    """
    problem = checked_problem(
        cost, source_mass, target_mass, epsilon, source_relaxation, target_relaxation, dtype, tolerance
    )
    if max_iterations < 1 or check_every < 1:
        raise SolverError(
            f"sinkhorn: max_iterations is {max_iterations} and check_every {check_every}; both must be at least 1"
        )
    buffer = torch.empty_like(problem.cost)
    answer = _iterate(problem, buffer, tolerance, max_iterations, check_every)
    plan = build_plan(problem, buffer, answer.source, answer.target)
    batch = cost.shape[:-2]
    return TransportPlan(
        plan=plan.reshape(cost.shape),
        source_potential=(answer.source * problem.epsilon).reshape(*batch, -1),
        target_potential=(answer.target * problem.epsilon).reshape(*batch, -1),
        iterations=answer.iterations.reshape(batch),
        marginal_error=answer.error.reshape(batch),
        converged=(answer.error <= tolerance).reshape(batch),
    )


@dataclass
class _Answer:
    """The state each item of the batch stopped in; potentials in units of epsilon."""

    source: torch.Tensor
    target: torch.Tensor
    iterations: torch.Tensor
    error: torch.Tensor

    def keep(
        self,
        active: torch.Tensor,
        settled: list[int],
        done: int,
        source: torch.Tensor,
        target: torch.Tensor,
        error: torch.Tensor,
    ) -> None:
        """Store the rows ``settled`` of the state; ``active`` says which items of the batch the rows are."""
        rows = torch.tensor(settled, device=active.device)
        items = active[rows]
        self.source[items], self.target[items] = source[rows], target[rows]
        self.iterations[items], self.error[items] = done, error[rows]


def _iterate(
    problem: Problem, buffer: torch.Tensor, tolerance: float, max_iterations: int, check_every: int
) -> _Answer:
    """Run all items until each has converged; an item's answer is the state of the check at which it did."""
    size = problem.cost.shape[0]
    sums = KernelSums(problem, buffer)
    sums.absorb(*initial_gauge(problem, buffer))
    target = sums.target_gauge
    row_sums = sums.rows(target)
    answer = _Answer(
        source=torch.zeros_like(problem.source_mass),
        target=target.clone(),
        iterations=torch.zeros(size, dtype=torch.int64, device=target.device),
        error=target.new_full((size,), math.inf),
    )
    active = torch.arange(size, device=target.device)
    still_open = [True] * size  # among the active ones
    done = 0
    while done < max_iterations:
        count = min(check_every if done else 1, max_iterations - done)
        state = _updates(problem, sums, target, row_sums, count)
        error = _marginal_error(problem, state[0], state[2])
        verdict = sums.judge(state[0], state[1], error)
        if not verdict.trusted:  # the plain sums ran out of range: the same updates again, by logsumexp
            state = _updates(problem, sums.exact(), target, row_sums, count)
            error = _marginal_error(problem, state[0], state[2])
            verdict = Verdict(trusted=True, stale=True, errors=error.tolist())
        source, target, row_sums = state
        done += count

        stop = done == max_iterations
        settled = [i for i, met in enumerate(verdict.errors) if still_open[i] and (stop or met <= tolerance)]
        stale = verdict.stale
        if settled:
            answer.keep(active, settled, done, source, target, error)
            for i in settled:
                still_open[i] = False
            left = [i for i, is_open in enumerate(still_open) if is_open]
            if not left:
                break
            if len(left) <= len(still_open) // 2:  # settled items are dead weight in every product
                chosen = torch.tensor(left, device=target.device)
                problem, active, still_open = problem.subset(chosen), active[chosen], [True] * len(left)
                source, target, row_sums = source[chosen], target[chosen], row_sums[chosen]
                sums, stale = KernelSums(problem, buffer[: len(left)]), True
        if stale:
            sums.absorb(source, target)
    return answer


def _updates(
    problem: Problem, sums: KernelSums, target: torch.Tensor, row_sums: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``count`` pairs of updates; ``row_sums`` belongs to ``target`` on the way in and on the way out."""
    for _ in range(count):
        source = row_sums * problem.source_factor
        if problem.relaxed:
            source = source + problem.best_shift(source, target)
        target = sums.columns(source) * problem.target_factor
        row_sums = sums.rows(target)
    return source, target, row_sums


def _marginal_error(problem: Problem, source: torch.Tensor, row_sums: torch.Tensor) -> torch.Tensor:
    """(B,): how far the source's optimality condition is off, as a share of the mass in the plan."""
    if problem.source_free:
        return torch.zeros_like(source[:, 0])
    carried = problem.source_mass * (source + row_sums).exp()
    wanted = problem.source_mass * (-source * problem.source_pull).exp()
    total = carried.sum(-1).clamp_min(torch.finfo(carried.dtype).tiny)
    return (carried - wanted).abs().sum(-1) / total
