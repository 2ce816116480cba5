"""Sinkhorn against POT, against its own definition, and on input it must refuse."""

from __future__ import annotations

import math
import warnings

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotresize_fx.errors import SolverError
from dotresize_fx.transport.sinkhorn import TransportPlan, sinkhorn

INF = math.inf
# A plan's distance from another solver's or another order's, as a share of its largest entry. Both sides stop
# at marginal errors of 1e-12 or less (1e-10 where the cost was shifted): what is left is far below 1e-6.
AGREEMENT = 1e-6


def random_problem(
    seed: int, rows: int = 23, columns: int = 17, batch: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Costs of mean 1 (*batch, n, k), and masses of total 1 (*batch, n), (*batch, k)."""
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(*batch, rows, 4, generator=generator, dtype=torch.float64)
    other = torch.randn(*batch, columns, 4, generator=generator, dtype=torch.float64)
    cost = torch.cdist(one, other)
    source = torch.rand(*batch, rows, generator=generator, dtype=torch.float64) + 0.1
    target = torch.rand(*batch, columns, generator=generator, dtype=torch.float64) + 0.1
    return (
        cost / cost.mean((-2, -1), keepdim=True),
        source / source.sum(-1, keepdim=True),
        target / target.sum(-1, keepdim=True),
    )


def distance(plan: torch.Tensor, other: torch.Tensor) -> float:
    return ((plan - other).abs().amax() / other.amax()).item()


def solved(*args: torch.Tensor, epsilon: float | torch.Tensor = 0.1, **options: object) -> TransportPlan:
    answer = sinkhorn(*args, epsilon=epsilon, **{"tolerance": 1e-12, **options})  # type: ignore[arg-type]
    assert bool(answer.converged.all())
    return answer


@pytest.mark.parametrize("epsilon", [0.5, 0.1, 0.03])
@pytest.mark.parametrize("seed", [0, 1])
def test_balanced_plan_is_pots(epsilon: float, seed: int) -> None:
    cost, source, target = random_problem(seed)
    expected = ot.sinkhorn(source, target, cost, epsilon, method="sinkhorn_log", stopThr=1e-13, numItermax=50_000)
    assert distance(solved(cost, source, target, epsilon=epsilon).plan, expected) < AGREEMENT


@pytest.mark.parametrize("epsilon", [0.2, 0.05])
@pytest.mark.parametrize(
    "strengths",
    [(1, 1), (0.1, 3), (100, 100), (INF, 0.5), (0.5, INF), (INF, 0), (0, INF), (0, 1), (1, 0), (0, 0)],
)
def test_relaxed_plan_is_pots_with_its_kl_reference(strengths: tuple[float, float], epsilon: float) -> None:
    cost, source, target = random_problem(2)
    target = target * (1.0 if INF in strengths else 1.7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # POT divides by zero when both marginals are free
        expected = ot.unbalanced.sinkhorn_unbalanced(
            source, target, cost, epsilon, strengths, reg_type="kl", stopThr=1e-15, numItermax=50_000
        )
    answer = solved(
        cost,
        source,
        target,
        epsilon=epsilon,
        source_relaxation=strengths[0],
        target_relaxation=strengths[1],
    )
    assert distance(answer.plan, expected) < AGREEMENT


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    scale=st.floats(0.01, 100),
)
def test_marginals_are_met_and_potentials_make_the_plan(seed: int, rows: int, columns: int, scale: float) -> None:
    cost, source, target = random_problem(seed, rows, columns)
    source, target = source * scale, target * scale
    answer = solved(cost, source, target, tolerance=1e-10, max_iterations=50_000)
    assert (answer.plan.sum(-1) - source).abs().sum() <= 1.01e-10 * scale  # the tolerance, and rounding
    assert (answer.plan.sum(-2) - target).abs().sum() <= 1e-12 * scale  # exact after its update, but rounding
    exponent = answer.source_potential[:, None] + answer.target_potential - cost
    rebuilt = source[:, None] * target * (exponent / 0.1).exp()
    assert distance(rebuilt, answer.plan) < 1e-10


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), strength=st.sampled_from([INF, 1.0]))
def test_permuting_neurons_permutes_the_plan(seed: int, strength: float) -> None:
    cost, source, target = random_problem(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(size, generator=generator) for size in cost.shape)
    options = {"source_relaxation": strength, "target_relaxation": strength}
    plan = solved(cost, source, target, **options).plan
    permuted = solved(cost[rows][:, columns], source[rows], target[columns], **options).plan
    assert distance(permuted, plan[rows][:, columns]) < AGREEMENT


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([1.0, 1e3]))
def test_shifting_rows_and_columns_of_the_cost_keeps_a_balanced_plan(seed: int, size: float) -> None:
    cost, source, target = random_problem(seed)
    generator = torch.Generator().manual_seed(seed)
    by_row = size * torch.randn(cost.shape[0], 1, generator=generator, dtype=torch.float64)
    by_column = size * torch.randn(cost.shape[1], generator=generator, dtype=torch.float64)
    shifted = solved(cost + by_row + by_column, source, target, tolerance=1e-10).plan
    assert distance(shifted, solved(cost, source, target).plan) < AGREEMENT


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), factor=st.floats(1e-3, 1e3), strength=st.sampled_from([INF, 0.3]))
def test_scaling_cost_with_every_strength_keeps_the_plan(seed: int, factor: float, strength: float) -> None:
    cost, source, target = random_problem(seed)
    plan = solved(cost, source, target, source_relaxation=strength).plan
    scaled = solved(cost * factor, source, target, epsilon=0.1 * factor, source_relaxation=strength * factor)
    assert distance(scaled.plan, plan) < AGREEMENT


@pytest.mark.parametrize("strengths", [(INF, INF), (1.0, INF), (0.2, 0.7)])
def test_batch_equals_loop(strengths: tuple[float, float]) -> None:
    """Items of very different difficulty: most of the batch is set aside while the hardest goes on."""
    cost, source, target = random_problem(3, batch=(2, 3))
    epsilon = torch.tensor([[1.0, 0.5, 0.2], [0.1, 0.05, 0.02]], dtype=torch.float64)
    options = {"source_relaxation": strengths[0], "target_relaxation": strengths[1]}
    together = solved(cost, source, target, epsilon=epsilon, **options)
    assert together.plan.shape == cost.shape
    assert together.iterations.shape == together.marginal_error.shape == (2, 3)
    for item in [(i, j) for i in range(2) for j in range(3)]:
        alone = solved(cost[item], source[item], target[item], epsilon=epsilon[item].item(), **options)
        # The same updates on the same numbers; only the order of sums differs, which may move a check by one.
        assert distance(together.plan[item], alone.plan) < 1e-9
        assert abs(int(together.iterations[item]) - int(alone.iterations)) <= 5


def test_small_epsilon_comes_down_to_exact_transport() -> None:
    cost, source, target = random_problem(4)
    exact = float(ot.emd2(source, target, cost))
    gaps = []
    for epsilon in (0.1, 1e-2, 1e-3):
        answer = solved(cost, source, target, epsilon=epsilon, tolerance=1e-9, max_iterations=100_000)
        gaps.append((answer.plan * cost).sum().item() - exact)
    # It costs at most epsilon * (entropy of a + entropy of b) too much (Peyré & Cuturi 2019, section 4.1).
    assert gaps[0] > gaps[1] > gaps[2] > -1e-8
    assert gaps[2] < 1e-3 * math.log(23 * 17)


def test_zero_masses_give_empty_rows_and_leave_the_rest_alone() -> None:
    cost, source, target = random_problem(5)
    source[:3], target[4] = 0, 0
    target *= source.sum() / target.sum()
    cost[:3, 4] = -1e6  # two empty ends that attract each other must not overflow into the others
    answer = solved(cost, source, target)
    assert bool(answer.plan.isfinite().all())
    assert answer.plan[:3].abs().max() == 0
    assert answer.plan[:, 4].abs().max() == 0
    columns = [j for j in range(17) if j != 4]
    without = solved(cost[3:][:, columns], source[3:], target[columns])
    assert distance(answer.plan[3:][:, columns], without.plan) < AGREEMENT


def test_masses_default_to_uniform_and_broadcast_over_the_batch() -> None:
    cost, source, _ = random_problem(6, batch=(3,))
    uniform = solved(cost, source[0])
    said = solved(cost, source[:1].expand(3, 23), torch.full((17,), 1 / 17, dtype=torch.float64))
    assert torch.equal(uniform.plan, said.plan)


def test_float32_is_answered_in_float32_and_integers_are_accepted() -> None:
    cost, source, target = random_problem(7)
    plan = sinkhorn(cost.float(), source, target, epsilon=0.1, tolerance=1e-5, dtype=torch.float32).plan
    assert plan.dtype == torch.float32
    assert distance(plan.double(), solved(cost, source, target).plan) < 1e-4  # ten times the tolerance
    assert solved((cost * 10).long(), epsilon=1.0).plan.dtype == torch.float64


def test_running_out_of_iterations_is_said_not_raised() -> None:
    cost, source, target = random_problem(8)
    answer = sinkhorn(cost, source, target, epsilon=0.01, max_iterations=7)
    assert int(answer.iterations) == 7
    assert not bool(answer.converged)
    error = (answer.plan.sum(-1) - source).abs().sum()
    assert answer.marginal_error == pytest.approx(error.item(), rel=1e-6)  # what it reports is what the plan has


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("batch", [(), (3,)])
def test_cuda_agrees_with_the_cpu(batch: tuple[int, ...]) -> None:
    problem = random_problem(9, batch=batch)
    on_gpu = solved(*(tensor.cuda() for tensor in problem), epsilon=0.05)
    assert on_gpu.plan.is_cuda
    assert distance(on_gpu.plan.cpu(), solved(*problem, epsilon=0.05).plan) < AGREEMENT


OK = torch.ones(3, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("cost", "options", "says"),
    [
        (torch.tensor([[1.0, math.nan]]), {}, "NaN or infinity"),
        (torch.tensor([[1.0, -INF]]), {}, "NaN or infinity"),
        (
            torch.tensor([[1e300]], dtype=torch.float64),
            {"dtype": torch.float32, "tolerance": 1e-5},
            "infinity",
        ),
        (torch.ones(3), {}, "non-empty"),
        (torch.ones(0, 3), {}, "non-empty"),
        (OK, {"source_mass": torch.tensor([1.0, -0.5, 0.5])}, "source_mass must be finite, not negative"),
        (OK, {"source_mass": torch.tensor([1.0, math.nan, 0.5])}, "source_mass must be finite"),
        (OK, {"target_mass": torch.zeros(2)}, "target_mass must be .*not all zero"),
        (OK, {"target_mass": torch.ones(3) / 3}, r"target_mass has shape \(3,\); the cost asks for \(2,\)"),
        (OK, {"target_mass": torch.tensor(1.0)}, "target_mass has shape"),
        (OK, {"source_mass": torch.ones(3)}, "different totals"),
        (OK, {"epsilon": 0.0}, "epsilon must be"),
        (OK, {"epsilon": math.nan}, "epsilon must be"),
        (OK, {"epsilon": torch.ones(2)}, "epsilon does not fit"),
        (OK, {"source_relaxation": -1.0}, "source_relaxation is -1.0"),
        (OK, {"target_relaxation": math.nan}, "target_relaxation is nan"),
        (OK, {"dtype": torch.float16}, "dtype is"),
        (OK, {"dtype": torch.float32}, "tolerance 1e-09 is out of reach"),
        (OK, {"max_iterations": 0}, "at least 1"),
    ],
)
def test_input_it_cannot_work_with_is_refused_in_one_line(
    cost: torch.Tensor, options: dict[str, object], says: str
) -> None:
    with pytest.raises(SolverError, match=says) as caught:
        sinkhorn(cost, **{"epsilon": 1.0, **options})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
