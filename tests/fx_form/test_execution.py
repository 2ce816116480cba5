"""Execution: the same results in pieces as at once, with nothing kept that is not needed any more."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.offload.stored_tensors import Spool

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def graph(trace: Callable[..., FxGraph]) -> FxGraph:
    """x -> linear -> relu -> linear_1 -> add(x, .), and relu as a second output."""
    return trace(
        lambda m, x: (x + m.down(h := torch.relu(m.up(x))), h), (2, 4), up=nn.Linear(4, 8), down=nn.Linear(8, 4)
    )


def test_agrees_with_the_exported_module(graph: FxGraph) -> None:
    expected = graph.program.module()(X)
    found = Execution(graph).outputs({"x": X})
    assert len(found) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not any(value.requires_grad for value in found)


@pytest.mark.parametrize("stops", [[4], [1, 4], [2, 3, 4], [1, 2, 3, 4], [0, 0, 2, 2, 4]])
def test_pieces_make_the_whole(graph: FxGraph, stops: list[int]) -> None:
    execution = Execution(graph)
    expected = execution.outputs({"x": X})
    environment, position = execution.start({"x": X}), 0
    kept = {}
    for stop in stops:
        kept |= execution.run(environment, position, stop, keep=execution.results)
        position = stop
    assert [torch.equal(kept[node], value) for node, value in zip(execution.results, expected, strict=True)] == [
        True,
        True,
    ]


def test_only_what_is_needed_later_stays(graph: FxGraph) -> None:
    execution = Execution(graph)
    environment = execution.start({"x": X})
    execution.run(environment, 0, 2)
    assert {node.name for node in environment} == {"x", "relu"}
    execution.run(environment, 2, 3)
    assert {node.name for node in environment} == {"x", "relu", "linear_1"}
    execution.run(environment, 3, 4)
    assert {node.name for node in environment} == {"add", "relu"}


def test_values_go_as_soon_as_they_were_used(trace: Callable[..., FxGraph]) -> None:
    def chain(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        for _ in range(9):
            x = torch.relu(x)
        return x

    class Watched(dict[torch.fx.Node, torch.Tensor]):
        most = 0

        def __setitem__(self, node: torch.fx.Node, value: torch.Tensor) -> None:
            super().__setitem__(node, value)
            self.most = max(self.most, len(self))

    execution = Execution(trace(chain, (2, 4)))
    environment = Watched(execution.start({"x": X}))
    execution.run(environment, 0, 9)
    assert environment.most == 2


def test_keeps_values_that_were_computed_before(graph: FxGraph) -> None:
    execution = Execution(graph)
    environment = execution.start({"x": X})
    relu = graph.node("relu")
    execution.run(environment, 0, 2)
    kept = execution.run(environment, 2, 4, keep=[relu, graph.node("x")])
    assert torch.equal(kept[graph.node("x")], X)
    assert kept[relu].shape == (3, 8)


def test_stand_ins_for_parameters(graph: FxGraph) -> None:
    execution = Execution(graph)
    up = graph.op("linear")
    assert up.weight is not None
    assert up.bias is not None
    stand_ins = {graph.node(up.weight.name): torch.zeros(8, 4), graph.node(up.bias.name): torch.ones(8)}
    hidden = graph.node("relu")
    scratch = execution.start({"x": X})
    assert torch.equal(execution.run(scratch, 0, 2, keep=[hidden], parameters=stand_ins)[hidden], torch.ones(3, 8))
    assert graph.weight(graph.op("linear")).abs().max() > 0


def test_sees_weights_as_they_are_now(graph: FxGraph) -> None:
    execution = Execution(graph)
    graph.set_weight(graph.op("linear"), torch.zeros(8, 4))
    graph.set_bias(graph.op("linear"), torch.ones(8))
    assert torch.equal(execution.outputs({"x": X})[1], torch.ones(3, 8))


def test_an_input_handed_through_is_an_output(trace: Callable[..., FxGraph]) -> None:
    graph = trace(lambda m, x: torch.relu(x).clone(), (2, 4))
    graph.bypass(graph.op("clone"))
    graph.bypass(graph.op("relu"))
    assert torch.equal(Execution(graph).outputs({"x": X})[0], X)


def test_half_products_round_what_weights_enter_and_no_positions(tiny_graph: Any, tiny_batch: Any) -> None:
    """Rotary tables stay as they are, and masks finite: a padded row has numbers."""
    _, graph = tiny_graph("llama")
    batch = tiny_batch(3, 12, padding=5)
    (expected,) = Execution(graph).outputs(batch)
    tables = [node for node in graph.nodes.nodes if node.target in (torch.ops.aten.cos.default,)]
    half = graph.copy()
    half.half_products = True
    execution = Execution(half.copy())
    (found,) = execution.outputs(batch)
    assert found.dtype is torch.bfloat16
    assert found.isfinite().all()
    real = batch["attention_mask"].bool()
    away = float((found - expected)[real].abs().max() / expected[real].abs().max())
    # Two layers of roundings of 4e-3 each.
    assert 1e-4 < away < 3e-2
    names = [node.name for node in tables]
    assert names
    exact = Execution(graph).run(Execution(graph).start(batch), 0, 40, keep=tables)
    rounded = execution.run(execution.start(batch), 0, 40, keep=[execution.graph.node(name) for name in names])
    assert all(torch.equal(rounded[execution.graph.node(node.name)], exact[node]) for node in tables)


def test_batches_wait_for_one_another_where_few_weights_are_held(tiny_graph: Any, tmp_path: Path) -> None:
    """Pieces cover the run, and what each reads of files can be held; without files there is one piece."""
    _, graph = tiny_graph("llama")
    assert Execution(graph).pieces(3, 20) == [20]
    sizes = {name: tensor.nbytes for name, tensor in graph.program.state_dict.items()}
    limit = max(sizes.values())
    graph.spool = Spool(tmp_path, held=2 * limit)
    for name, tensor in list(graph.program.state_dict.items()):
        graph.program.state_dict[name] = torch.nn.Parameter(graph.spool.put(tensor), requires_grad=False)
    execution = Execution(graph)
    stops = execution.pieces(0, len(execution.nodes))
    assert len(stops) > 2
    assert stops == sorted(set(stops))
    assert stops[-1] == len(execution.nodes)
    held = set(execution.parameters) - execution._tables  # of a table rows alone are read
    keys = {node: str(key) for node, key in execution._keys.items() if node in held}
    for start, stop in pairwise([0, *stops]):
        read = {keys[node] for one in execution.nodes[start:stop] for node in one.all_input_nodes if node in keys}
        of_files = sum(sizes[key] for key in read if key in sizes)
        assert of_files <= limit


def test_batches_wait_where_few_values_cross(tiny_graph: Any, tiny_batch: Any, tmp_path: Path) -> None:
    """Where weights of a block and a half can be held, in front of a norm: the stream alone waits there."""
    _, graph = tiny_graph("llama")
    stored = graph.program.state_dict
    block = sum(tensor.nbytes for name, tensor in stored.items() if "layers.0." in name)
    graph.spool = Spool(tmp_path, held=3 * block)
    for name, tensor in list(stored.items()):
        stored[name] = torch.nn.Parameter(graph.spool.put(tensor), requires_grad=False)
    execution = Execution(graph)
    *stops, _ = execution.pieces(0, len(execution.nodes))
    assert stops
    environment, position = execution.start(tiny_batch(1, 8)), 0
    for stop in stops:
        execution.run(environment, position, position := stop)
        assert [tuple(value.shape) for value in environment.values() if value.is_floating_point()] == [(1, 8, 32)]
