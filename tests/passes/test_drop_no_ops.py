"""DropNoOps: what changes nothing goes, everything else stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.drop_no_ops import DropNoOps

X = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(0))


def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.relu(m.up(x)).to(torch.float32)
    m.unused(x)
    return x + m.down(F.dropout(hidden, 0.1, m.training))


def test_before_and_after(
    trace: Callable[..., FxGraph], text: Callable[[FxGraph], str], run: Callable[..., list[torch.Tensor]]
) -> None:
    graph = trace(forward, (2, 3, 4), up=nn.Linear(4, 8), down=nn.Linear(8, 4, bias=False), unused=nn.Linear(4, 4))
    assert (
        text(graph)
        == """\
linear_1: 8 = linear(x, up.weight[8,4], up.bias[8])
relu_1: 8 = relu(linear_1)
to_1: 8 = to(relu_1)
linear_2: 4 = linear(x, unused.weight[4,4], unused.bias[4])
dropout_1: 8 = dropout(to_1)
linear_3: 4 = linear(dropout_1, down.weight[4,8])
add_1: 4 = add(x, linear_3)
return add_1"""
    )
    before = run(graph, x=X)
    result = DropNoOps()(graph)
    assert result.modified
    assert (
        text(graph)
        == """\
linear_1: 8 = linear(x, up.weight[8,4], up.bias[8])
relu_1: 8 = relu(linear_1)
linear_2: 4 = linear(relu_1, down.weight[4,8])
add_1: 4 = add(x, linear_2)
return add_1"""
    )
    assert torch.equal(run(graph, x=X)[0], before[0])
    assert "unused.weight" not in graph.program.state_dict


def test_a_second_run_finds_nothing(trace: Callable[..., FxGraph]) -> None:
    graph = trace(forward, (2, 3, 4), up=nn.Linear(4, 8), down=nn.Linear(8, 4), unused=nn.Linear(4, 4))
    DropNoOps()(graph)
    assert not DropNoOps()(graph).modified


def test_casts_that_change_the_dtype_stay(trace: Callable[..., FxGraph], text: Callable[[FxGraph], str]) -> None:
    graph = trace(lambda m, x: (x.to(torch.bfloat16).to(torch.float32) * 2).to(torch.int32), (2, 4))
    DropNoOps()(graph)
    assert (
        text(graph)
        == """\
to_1: 4 = to(x)
to_2: 4 = to(to_1)
scale_1: 4 = scale(to_2, 2)
to_3: 4 = to(scale_1)
return to_3"""
    )


def test_dropout_that_was_traced_in_training_stays(trace: Callable[..., FxGraph]) -> None:
    graph = trace(lambda m, x: F.dropout(x, 0.5, True) + 1, (2, 4))
    assert not DropNoOps()(graph).modified
    assert graph.ops[0].spelling == "dropout.default"


def test_an_output_that_is_only_handed_on_keeps_its_place(
    trace: Callable[..., FxGraph], run: Callable[..., list[torch.Tensor]]
) -> None:
    graph = trace(lambda m, x: (torch.relu(x).to(torch.float32), x + 1), (2, 4))
    DropNoOps()(graph)
    first, second = run(graph, x=X)
    assert torch.equal(first, torch.relu(X))
    assert torch.equal(second, X + 1)


def test_slices_of_all_and_joins_with_nothing_go(trace: Any, text: Any, run: Any) -> None:
    """As Phi-3 spells a rotary embedding of which no part is left out."""

    def partial(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([m.up(x[..., :4]), x[..., 4:]], -1)

    graph = trace(partial, (2, 3, 4), up=nn.Linear(4, 4))
    before = run(graph, x=X)
    assert DropNoOps()(graph).modified
    assert text(graph) == "linear_1: 4 = linear(x, up.weight[4,4], up.bias[4])\nreturn linear_1"
    assert torch.equal(run(graph, x=X)[0], before[0])
    assert not DropNoOps()(graph).modified


def test_slices_and_joins_of_something_stay(trace: Any) -> None:
    def partial(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([m.up(x[..., :3]), x[..., 3:]], -1)

    assert not DropNoOps()(trace(partial, (2, 3, 4), up=nn.Linear(3, 3))).modified
