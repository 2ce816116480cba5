"""Shapes told anew are those that torch tells, though each question is asked once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from dotresize_fx.export.capture import Captured
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.fx_form.shapes import moved, refresh_shapes
from dotresize_fx.graph import Kind

Trace = Callable[..., FxGraph]


def shapes(graph: FxGraph) -> list[str]:
    def told(value: Any) -> Any:
        return (value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value

    return [f"{n.name}: {torch.utils._pytree.tree_map(told, n.meta.get('val'))}" for n in graph.nodes.nodes]


def told_by_torch(graph: FxGraph) -> list[str]:
    placeholders = [n.meta["val"] for n in graph.nodes.nodes if n.op == "placeholder"]
    with enable_python_dispatcher():
        prop = FakeTensorProp(graph.program.graph_module, placeholders[0].fake_mode)
        prop.propagate_dont_convert_inputs(*placeholders)
    return shapes(graph)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "bert"])
def test_shapes_of_a_model_are_those_that_torch_tells(
    tiny_captured: Callable[[str], tuple[Any, Captured]], kind: str
) -> None:
    graph = tiny_captured(kind)[1].graph.copy()
    expected = told_by_torch(graph)
    for node in graph.nodes.nodes:
        if node.op == "call_function":
            del node.meta["val"]
    refresh_shapes(graph.program)
    assert shapes(graph) == expected


def test_layers_of_other_widths_are_told_apart(trace: Trace) -> None:
    layers = {f"up{i}": nn.Linear(4, 8) for i in range(2)} | {f"down{i}": nn.Linear(8, 4) for i in range(2)}
    graph = trace(lambda m, x: m.down1(m.up1(m.down0(m.up0(x)).relu())), (3, 4), **layers)
    _, _, up, down = [op for op in graph.ops if op.kind is Kind.LINEAR]
    graph.set_weight(up, graph.weight(up)[:6])
    graph.set_bias(up, None)
    graph.set_weight(down, graph.weight(down)[:, :6])
    graph.refresh_shapes()
    widths = [int(graph.node(op.name).meta["val"].shape[-1]) for op in graph.ops if op.kind is Kind.LINEAR]
    assert widths == [8, 4, 6, 4]


def test_sizes_that_only_numbers_tell_are_each_call_s_own(trace: Trace) -> None:
    graph = trace(lambda m, x: (x.relu().nonzero().sum(1), (x + 1).relu().nonzero().sum(1)), (3, 4))
    refresh_shapes(graph.program)
    first, second = (n.meta["val"].shape[0] for n in graph.nodes.nodes if "nonzero" in str(n.target))
    assert first.node.expr != second.node.expr


def test_what_is_written_into_is_each_call_s_own(trace: Trace) -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        first, second = x.relu(), x.relu()
        flat = first.view(-1)
        first.unsqueeze_(0)
        return first.sum(-1), flat.sum(), second.sum(-1)

    graph = trace(forward, (3, 4))
    expected = told_by_torch(graph)
    refresh_shapes(graph.program)
    assert shapes(graph) == expected


def test_shapes_move_with_the_program(trace: Trace) -> None:
    graph = trace(lambda m, x: m.layer(x).relu(), (3, 4), layer=nn.Linear(4, 4))
    before = shapes(graph)
    assert {n.meta["val"].device.type for n in graph.nodes.nodes if n.op != "output"} == {"cpu"}
    graph.program = moved(graph.program, "meta")
    assert {n.meta["val"].device.type for n in graph.nodes.nodes if n.op != "output"} == {"meta"}
    assert shapes(graph) == before
