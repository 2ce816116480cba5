"""RecogniseLinears: GPT-2's addmm between reshapes is a linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.passes.recognise_linears import RecogniseLinears

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
# One product of float32, taken in the other order: rounding only.
ROUNDING = 1e-6


def conv1d(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.addmm(m.bias, x.view(-1, 4), m.weight).view(x.shape[0], 5, 6)


def parts() -> dict[str, Parameter]:
    return {"weight": Parameter(torch.empty(4, 6)), "bias": Parameter(torch.empty(6))}


def test_before_and_after(
    trace: Callable[..., FxGraph],
    text: Callable[[FxGraph], str],
    run: Callable[..., list[torch.Tensor]],
    difference: Callable[..., float],
) -> None:
    graph = trace(conv1d, (2, 5, 4), **parts())
    assert (
        text(graph)
        == """\
view_1: 4 = view(x)
addmm_1: 6 = addmm(bias[6], view_1, weight[4,6])
view_2: 6 = view(addmm_1)
return view_2"""
    )
    before = run(graph, x=X)
    assert RecogniseLinears()(graph).modified
    (linear,) = graph.ops
    assert (linear.kind, linear.inputs[0].name) == (Kind.LINEAR, "x")
    assert graph.weight(linear).shape == (6, 4)
    assert text(graph).count("\n") == 1
    assert difference(run(graph, x=X), before) <= ROUNDING


def test_a_matrix_that_was_not_reshaped(
    trace: Callable[..., FxGraph], run: Callable[..., list[torch.Tensor]], difference: Callable[..., float]
) -> None:
    graph = trace(lambda m, x: torch.addmm(m.bias, x, m.weight), (2, 4), **parts())
    before = run(graph, x=X[0])
    RecogniseLinears()(graph)
    assert [op.kind for op in graph.ops] == [Kind.LINEAR]
    assert difference(run(graph, x=X[0]), before) <= ROUNDING


def test_reshapes_that_do_not_undo_each_other_stay(
    trace: Callable[..., FxGraph], run: Callable[..., list[torch.Tensor]], difference: Callable[..., float]
) -> None:
    graph = trace(lambda m, x: torch.addmm(m.bias, x.view(-1, 4), m.weight).view(5, -1, 6), (2, 5, 4), **parts())
    before = run(graph, x=X)
    RecogniseLinears()(graph)
    assert [op.kind for op in graph.ops if op.output.shape] == [Kind.KEEP, Kind.LINEAR, Kind.KEEP]
    assert difference(run(graph, x=X), before) <= ROUNDING


def test_the_joined_matrix_as_an_output(
    trace: Callable[..., FxGraph], run: Callable[..., list[torch.Tensor]], difference: Callable[..., float]
) -> None:
    graph = trace(lambda m, x: torch.addmm(m.bias, x.view(-1, 4), m.weight), (2, 5, 4), **parts())
    before = run(graph, x=X)
    assert RecogniseLinears()(graph).modified
    assert not any(op.kind is Kind.ADDMM for op in graph.ops)
    assert difference(run(graph, x=X), before) <= ROUNDING


def test_an_addmm_of_activations_is_no_linear(trace: Callable[..., FxGraph]) -> None:
    square, bias = Parameter(torch.empty(4, 4)), Parameter(torch.empty(4))
    graph = trace(
        lambda m, x: torch.addmm(x, x, m.square) + torch.addmm(m.bias, x, torch.relu(m.square)),
        (2, 4),
        square=square,
        bias=bias,
    )
    assert not RecogniseLinears()(graph).modified


def test_a_scaled_addmm_is_no_linear(trace: Callable[..., FxGraph]) -> None:
    graph = trace(lambda m, x: torch.addmm(m.bias, x, m.weight, beta=2), (2, 4), **parts())
    assert not RecogniseLinears()(graph).modified


def test_a_bias_of_two_dimensions_is_none(trace: Callable[..., FxGraph]) -> None:
    grid = Parameter(torch.empty(1, 6))
    graph = trace(lambda m, x: torch.addmm(m.grid, x, m.weight), (2, 4), grid=grid, weight=parts()["weight"])
    assert not RecogniseLinears()(graph).modified
