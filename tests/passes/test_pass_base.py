"""What holds for every pass: conditions around the call, and a result that says what was done."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Graph, Kind
from dotresize_fx.passes.pass_base import Pass, PassContractError, PassResult, promise


class BypassRelu(Pass):
    """Takes a graph with ReLUs; promises one without, and misses all but the first."""

    def requires(self, graph: Graph) -> None:
        promise(any(op.function == "relu" for op in graph.ops), "no relu to bypass")

    def call(self, graph: Graph) -> PassResult:
        relu = next((op for op in graph.ops if op.function == "relu"), None)
        if relu is None:
            return PassResult()
        graph.bypass(relu)
        return PassResult((f"bypassed {relu.name}",))

    def ensures(self, graph: Graph) -> None:
        promise(not any(op.function == "relu" for op in graph.ops), "a relu is left")


@pytest.fixture
def relus(trace: Callable[..., FxGraph]) -> Callable[[int], FxGraph]:
    def make(count: int) -> FxGraph:
        def forward(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            for _ in range(count):
                y = torch.relu(y)
            return y

        return trace(forward, (2, 4))

    return make


def test_says_what_it_did(relus: Callable[[int], FxGraph]) -> None:
    result = BypassRelu()(relus(1))
    assert result.modified
    assert result.records == ("bypassed relu",)
    assert not PassResult().modified


def test_refuses_a_graph_it_cannot_take(relus: Callable[[int], FxGraph]) -> None:
    with pytest.raises(PassContractError, match="no relu to bypass"):
        BypassRelu()(relus(0))


def test_notices_a_promise_it_did_not_keep(relus: Callable[[int], FxGraph]) -> None:
    graph = relus(2)
    with pytest.raises(PassContractError, match="a relu is left"):
        BypassRelu()(graph)
    assert [op.kind for op in graph.ops] == [Kind.POINTWISE, Kind.POINTWISE]


def test_without_check_no_condition_runs(relus: Callable[[int], FxGraph]) -> None:
    assert not BypassRelu()(relus(0), check=False).modified
    assert BypassRelu()(relus(2), check=False).modified
