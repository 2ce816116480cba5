"""Inputs that need not be given, and which outputs carry an input on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dotresize_fx.fx_form.cache import find_caches
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.fx_form.trunk import Trunk

HEADS, SIZE = 2, 4


class OneLayer(torch.nn.Module):
    """Keys of each token and position behind those of the past; their sum over all tokens, a token each."""

    def __init__(self, *, axis: int = -2) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(11, HEADS * SIZE)
        self.axis = axis

    def forward(self, input_ids: Any, position_ids: Any, past_key_values_0_key: Any) -> Any:
        rows = self.table(input_ids) + position_ids[..., None]
        keys = rows.view(*input_ids.shape, HEADS, SIZE).transpose(1, 2)
        joined = torch.cat([past_key_values_0_key, keys], self.axis)
        return rows * joined.sum(), joined


@pytest.fixture(scope="module")
def graph() -> FxGraph:
    return exported(OneLayer())


def exported(module: OneLayer) -> FxGraph:
    ids = torch.zeros(2, 5, dtype=torch.int64)
    inputs = (ids, ids, torch.zeros(2, HEADS, 3 if module.axis == -2 else 5, SIZE))
    batch, length, past = (torch.export.Dim(name, max=64) for name in ("batch", "length", "past"))
    last = {0: batch, 2: past if module.axis == -2 else length}
    shapes = ({0: batch, 1: length}, {0: batch, 1: length}, last)
    found = FxGraph(torch.export.export(module.eval().requires_grad_(False), inputs, dynamic_shapes=shapes))
    found.caches.update(find_caches(found))
    return found


def test_the_output_that_carries_an_input_on(graph: FxGraph) -> None:
    ((present, past),) = graph.caches.items()
    assert past == "past_key_values_0_key"
    assert present in {value.name for value in graph.outputs}
    assert graph.copy().caches == graph.caches
    assert exported(OneLayer(axis=1)).caches == {}  # more heads are no more tokens


def test_what_is_not_given_is_empty_or_counted(graph: FxGraph) -> None:
    ids = torch.tensor([[3, 4, 5, 6]])
    given = {
        "input_ids": ids,
        "position_ids": torch.arange(4)[None],
        "past_key_values_0_key": torch.zeros(1, HEADS, 0, SIZE),
    }
    (alone,) = Execution(graph).outputs({"input_ids": ids})
    whole, present = Execution(graph, caches=True).outputs(given)
    torch.testing.assert_close(alone, whole)
    assert present.shape == (1, HEADS, 4, SIZE)
    behind = {"input_ids": ids[:, 3:], "position_ids": torch.tensor([[3]]), "past_key_values_0_key": present[:, :, :3]}
    torch.testing.assert_close(Execution(graph).outputs(behind)[0], whole[:, 3:])
    trunk = Trunk(graph, cut_head=False)
    values = {key: graph.stored(key) for key in trunk.keys}
    torch.testing.assert_close(trunk(values, {"input_ids": ids})[0], whole)
    with pytest.raises(KeyError, match="input_ids"):
        Execution(graph).start({})


def test_an_empty_past_may_have_had_other_heads(graph: FxGraph) -> None:
    """The sweep keeps its inputs while heads are cut."""
    execution = Execution(graph)
    environment = execution.start({"input_ids": torch.tensor([[3, 4]])})
    (past,) = (node for node in environment if node.name == "past_key_values_0_key")
    environment[past] = torch.zeros(1, HEADS, 0, SIZE + 3)
    execution.run(environment, 0, len(execution.nodes))


def test_a_cache_takes_other_sizes(graph: FxGraph) -> None:
    narrow = graph.copy()
    before = graph.value(graph.node("past_key_values_0_key")).shape
    narrow.resize_input("past_key_values_0_key", {3: 2})
    assert narrow.value(narrow.node("past_key_values_0_key")).shape == (*before[:3], 2)
    assert graph.value(graph.node("past_key_values_0_key")).shape == before
