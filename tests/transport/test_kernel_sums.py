"""The fast sums are the exact ones, near the gauge and when they have to be given up."""

from __future__ import annotations

import math

import pytest
import torch

from dotresize_fx.transport.kernel_sums import KernelSums, initial_gauge
from dotresize_fx.transport.problem import Problem, checked_problem
from dotresize_fx.transport.sinkhorn import sinkhorn


def problem_at(epsilon: float, strength: float = math.inf, dtype: torch.dtype = torch.float64) -> Problem:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2, 40, 6, generator=generator, dtype=torch.float64)
    cost = torch.cdist(points, points[:, :25], p=1)
    return checked_problem(cost / cost.median(), None, None, epsilon, strength, strength, dtype, torch.finfo(dtype).eps)


def reference(cost: torch.Tensor, epsilon: float, strength: float, iterations: int) -> torch.Tensor:
    """Textbook log-domain iteration with uniform masses, ending on the columns."""
    rows, columns = cost.shape
    damping = 1.0 if math.isinf(strength) else strength / (strength + epsilon)
    target = torch.zeros(columns, dtype=cost.dtype)
    for _ in range(iterations):
        source = -damping * torch.logsumexp(target - cost / epsilon - math.log(columns), 1)
        target = -damping * torch.logsumexp(source[:, None] - cost / epsilon - math.log(rows), 0)
    return (source[:, None] + target - cost / epsilon).exp() / (rows * columns)


@pytest.mark.parametrize("epsilon", [1.0, 1e-2, 1e-4])
def test_fast_sums_equal_exact_sums_around_the_gauge(epsilon: float) -> None:
    problem = problem_at(epsilon)
    fast = KernelSums(problem, torch.empty_like(problem.cost))
    fast.absorb(*initial_gauge(problem, torch.empty_like(problem.cost)))
    slow = KernelSums(problem, torch.empty_like(problem.cost)).exact()
    generator = torch.Generator().manual_seed(1)
    drift = 100 * (torch.rand(2, 2, 40, generator=generator, dtype=torch.float64) - 0.5)
    source, target = fast.source_gauge + drift[0], fast.target_gauge + drift[1, :, :25]
    # Logs of magnitude 1 / epsilon, each rounded to 1e-16 of itself.
    allowed = 1e-13 / epsilon + 1e-12
    assert (fast.rows(target) - slow.rows(target)).abs().max() < allowed
    assert (fast.columns(source) - slow.columns(source)).abs().max() < allowed


def test_initial_gauge_leaves_a_one_in_every_row_and_column() -> None:
    problem = problem_at(1e-4)
    buffer = torch.empty_like(problem.cost)
    sums = KernelSums(problem, buffer)
    sums.absorb(*initial_gauge(problem, buffer))
    # The exponents are differences of numbers around 1e4, rounded to 1e-12.
    torch.testing.assert_close(buffer.amax(-1), torch.ones(2, 40, dtype=torch.float64), rtol=1e-10, atol=0)
    torch.testing.assert_close(buffer.amax(-2), torch.ones(2, 25, dtype=torch.float64), rtol=1e-10, atol=0)


def test_drift_moves_the_gauge_first_and_then_loses_trust() -> None:
    problem = problem_at(0.1)
    sums = KernelSums(problem, torch.empty_like(problem.cost))
    still, error = torch.zeros_like(problem.source_mass), torch.zeros(2, dtype=torch.float64)
    target = torch.zeros_like(problem.target_mass)
    verdicts = [sums.judge(still + drift, target, error) for drift in (10.0, 100.0, 300.0, math.nan)]
    assert [(verdict.trusted, verdict.stale) for verdict in verdicts[:2]] == [(True, False), (True, True)]
    assert [verdict.trusted for verdict in verdicts[2:]] == [False, False]


@pytest.mark.parametrize(
    ("epsilon", "strength", "gives_up"), [(1e-3, math.inf, False), (1e-3, 1e-3, True), (1e-4, 0.1, True)]
)
def test_small_epsilon_gives_the_plan_of_the_textbook_iteration(
    epsilon: float, strength: float, gives_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a fixed point; in the relaxed cases through the exact sums, which the test makes sure of."""
    exact_rounds = []
    exact = KernelSums.exact
    monkeypatch.setattr(KernelSums, "exact", lambda sums: exact_rounds.append(1) or exact(sums))
    cost = problem_at(1.0).cost[0, 30:36, :5].contiguous()  # no neuron meets itself: no zeros
    answer = sinkhorn(
        cost,
        epsilon=epsilon,
        source_relaxation=strength,
        target_relaxation=strength,
        tolerance=1e-10,
        max_iterations=100_000,
    )
    assert bool(answer.converged)
    assert bool(exact_rounds) == gives_up
    expected = reference(cost, epsilon, strength, int(answer.iterations) * 3 + 20_000)
    assert ((answer.plan - expected).abs().max() / expected.max()).item() < 1e-6


def test_float32_keeps_to_its_own_range() -> None:
    """At this epsilon float32's kernel spans exp(+-1000): only absorption and exact sums get through it."""
    problem = problem_at(1e-3)
    options = {"epsilon": 1e-3, "source_relaxation": 0.05, "target_relaxation": 0.05}
    single = sinkhorn(problem.cost, **options, tolerance=1e-3, dtype=torch.float32)
    double = sinkhorn(problem.cost, **options, tolerance=1e-9)
    assert bool(single.converged.all())
    # Exponents around 1e3 carry a rounding of 1e-4 in float32, and the tolerance is 1e-3 of the mass.
    total = double.plan.sum((-2, -1))
    assert ((single.plan - double.plan).abs().sum((-2, -1)) / total).max() < 2e-2
