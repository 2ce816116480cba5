"""The trunk is the program before its head, under autocast and on other devices too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from dotresize_fx.errors import UsageError
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.fx_form.trunk import Trunk

Batch = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def dense(tiny_graph: Callable[[str], tuple[Any, FxGraph]]) -> FxGraph:
    return tiny_graph("llama")[1]


@pytest.fixture(scope="module")
def held_out(tiny_batch: Callable[..., Batch]) -> list[Batch]:
    return [tiny_batch(4, 32, seed=100)]


def test_a_trunk_and_its_head_are_the_program(dense: FxGraph, held_out: list[Batch]) -> None:
    expected = Execution(dense).outputs(held_out[0])[0]
    for cut_head, bfloat16 in ((True, False), (False, False), (True, True)):
        trunk = Trunk(dense, cut_head=cut_head, bfloat16=bfloat16)
        values = {key: dense.stored(key) for key in trunk.keys}
        states, _ = trunk(values, held_out[0])
        assert (trunk.head is not None) == cut_head
        found = torch.nn.functional.linear(states, values[trunk.head.weight]) if trunk.head else states
        torch.testing.assert_close(found, expected)
    with pytest.raises(UsageError, match="no_such_stream"):
        Trunk(dense, ["no_such_stream"])


def test_position_tables_stay_exact_under_autocast(trace: Callable[..., FxGraph]) -> None:
    def forward(module: Any, x: torch.Tensor) -> torch.Tensor:
        return module.part(x) + x @ torch.full((4, 4), 1.001)

    graph = trace(forward, (2, 4), part=torch.nn.Linear(4, 4))
    trunk = Trunk(graph, bfloat16=True)
    values = {key: torch.zeros_like(graph.stored(key)) if "part" in key else graph.stored(key) for key in trunk.keys}
    x = torch.full((2, 4), 0.2503)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = trunk(values, {graph.program.graph_signature.user_inputs[0]: x})
    torch.testing.assert_close(found, x * 4 * 1.001)


def test_blocks_share_one_mask(dense: FxGraph) -> None:
    lowest = [node for node in dense.nodes.nodes if torch.finfo(torch.float32).min in node.args]
    trunk = Trunk(dense)
    code = trunk._forward.__self__.code  # type: ignore[attr-defined]
    assert len(lowest) == 2
    assert code.count(str(torch.finfo(torch.float32).min)) == 1


def test_rounding_weights_once_is_what_autocast_does(dense: FxGraph, held_out: list[Batch]) -> None:
    trunk = Trunk(dense, bfloat16=True)
    assert "model.layers.0.mlp.up_proj.weight" in trunk.products
    # Read by a norm, by the embedding and by the head that was cut off.
    assert trunk.products.isdisjoint({"model.norm.weight", "lm_head.weight"})
    assert not Trunk(dense).products
    values = {key: dense.stored(key).detach() for key in trunk.keys}
    rounded = values | {key: values[key].bfloat16() for key in trunk.products}
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False), torch.no_grad():
        found, expected = trunk(rounded, held_out[0])[0], trunk(values, held_out[0])[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert"])
def test_nothing_stays_behind_on_another_device(tiny_graph: Callable[..., Any], kind: str) -> None:
    """A tensor that tracing put on the CPU would be copied in every step, and a recording would not hold it."""
    graph = tiny_graph(kind)[1]
    graph.to("meta")
    code = Trunk(graph)._forward.__self__.code  # type: ignore[attr-defined]
    assert "cpu" not in code
    values = {key: graph.stored(key) for key in Trunk(graph).keys}
    assert {tensor.device.type for tensor in values.values()} == {"meta"}
