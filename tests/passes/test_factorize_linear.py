"""One linear as two: the same function at full rank, and what must not be touched is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.errors import UsageError
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.factorize_linear import FactorizeLinear, why_not_factorized
from dotresize_fx.passes.pass_base import PassContractError
from dotresize_fx.rank.factors import Factors


def whole(graph: FxGraph, name: str, rank: int) -> Factors:
    """The leading singular triplets of the linear's weight."""
    weight = graph.weight(graph.op(name)).double()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return Factors(values[:rank, None] * right[:rank], left[:, :rank])


@pytest.fixture
def ffn(trace: Any) -> FxGraph:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.down(torch.relu(m.up(x)))

    graph: FxGraph = trace(forward, (2, 6), up=nn.Linear(6, 12), down=nn.Linear(12, 6, bias=False))
    return graph


def test_before_and_after(ffn: FxGraph, text: Any) -> None:
    assert text(ffn).splitlines() == [
        "linear_1: 12 = linear(x, up.weight[12,6], up.bias[12])",
        "relu_1: 12 = relu(linear_1)",
        "linear_2: 6 = linear(relu_1, down.weight[6,12])",
        "return linear_2",
    ]
    result = FactorizeLinear({"linear": whole(ffn, "linear", 4)})(ffn)
    assert result.records == ("linear: 12 x 6 of rank 4",)
    assert text(ffn).splitlines() == [
        "linear_1: 4 = linear(x, up.reduced.weight[4,6])",
        "linear_2: 12 = linear(linear_1, up.weight[12,4], up.bias[12])",
        "relu_1: 12 = relu(linear_2)",
        "linear_3: 6 = linear(relu_1, down.weight[6,12])",
        "return linear_3",
    ]


def test_at_full_rank_nothing_changes(ffn: FxGraph, run: Any, difference: Any) -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    before = run(ffn, x=x)
    factors = {name: whole(ffn, name, 6) for name in ("linear", "linear_1")}
    assert FactorizeLinear(factors, guard=False)(ffn).modified
    assert difference(run(ffn, x=x), before) < 1e-6  # rounding of one more product


def test_a_rank_that_makes_it_slower_is_refused(ffn: FxGraph, text: Any) -> None:
    before = text(ffn)
    with pytest.raises(UsageError, match="rank 5 of 12 x 6 would make it slower than it is: 4 is the largest"):
        FactorizeLinear({"linear": whole(ffn, "linear", 5)}, guard=True)(ffn)
    assert text(ffn) == before


def test_a_shared_weight_is_left_alone(trace: Any) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.same(torch.relu(m.same(x)))

    graph = trace(forward, (2, 6), same=nn.Linear(6, 6))
    assert "shared" in why_not_factorized(graph, "linear")
    with pytest.raises(PassContractError, match="shared"):
        FactorizeLinear({"linear": whole(graph, "linear", 2)})(graph)


def test_what_is_no_linear_is_left_alone(ffn: FxGraph) -> None:
    assert "no linear" in why_not_factorized(ffn, "relu")


def test_factors_of_another_linear_are_refused(ffn: FxGraph) -> None:
    with pytest.raises(PassContractError, match="another shape"):
        FactorizeLinear({"linear": whole(ffn, "linear_1", 2)})(ffn)
