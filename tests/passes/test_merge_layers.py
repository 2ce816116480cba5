"""One block less: weights averaged, the cache closed up, the same function where the blocks were the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dotresize_fx.cost import count_cost
from dotresize_fx.export.cached_runs import continued, prompt_inputs
from dotresize_fx.export.capture import Captured
from dotresize_fx.export.capture_cache import capture_with_cache
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.drop_layers import DropLayers
from dotresize_fx.passes.find_blocks import find_blocks
from dotresize_fx.passes.merge_layers import MergeLayers
from dotresize_fx.passes.pass_base import PassContractError

# Of the largest output: float32, sums in other orders.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def cached(tiny_model: Any) -> tuple[Captured, FxGraph]:
    """Three blocks with a cache."""
    captured = capture_with_cache(tiny_model("llama", layers=3))
    canonicalise(captured.graph)
    return captured, captured.graph


def test_before_and_after(tiny_graph: Any, text: Any) -> None:
    _, graph = tiny_graph("llama")
    before = text(graph).splitlines()
    first, second = find_blocks(graph)
    result = MergeLayers(first, second, 0.25)(graph)
    assert result.records[0] == f"{second.end.name}: 0.250 of the block before it merged in"
    after = text(graph).splitlines()
    assert len(before) - len(after) == len(first.ops) + 8  # and its own copy of the mask's arithmetic
    norms = [line for line in after if "rms_norm" in line and "=" in line and "rms_norm(" in line]
    assert norms == [
        "rms_norm_1: 32 = rms_norm(embedding_1, model.layers.1.input_layernorm.weight[32], eps=1e-06)",
        "rms_norm_2: 32 = rms_norm(add_3, model.layers.1.post_attention_layernorm.weight[32], eps=1e-06)",
        "rms_norm_3: 32 = rms_norm(add_4, model.norm.weight[32], eps=1e-06)",
    ]
    assert not any("layers.0" in line for line in after)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "mixtral"])
def test_weights_are_averaged(tiny_graph: Any, kind: str, alpha: float) -> None:
    _, graph = tiny_graph(kind)
    first, second = find_blocks(graph)
    pairs = [
        (name, graph.weight(graph.op(one)), graph.weight(graph.op(name)))
        for one, name in zip(first.owned, second.owned, strict=True)
        if graph.op(one).weight is not None
    ]
    before = count_cost(graph, 1).block_linear_weights
    MergeLayers(first, second, alpha)(graph)
    for name, a, b in pairs:
        torch.testing.assert_close(graph.weight(graph.op(name)), alpha * a + (1 - alpha) * b)
    assert count_cost(graph, 1).block_linear_weights == before // 2


def test_all_of_the_second_is_dropping_the_first(tiny_graph: Any, tiny_batch: Any, run: Any) -> None:
    _, graph = tiny_graph("llama")
    dropped = graph.copy()
    first, second = find_blocks(graph)
    DropLayers([first])(dropped)
    MergeLayers(first, second, 0.0)(graph)
    batch = tiny_batch(3, 9, 2)
    assert torch.equal(run(graph, **batch)[0], run(dropped, **batch)[0])


def test_a_block_that_adds_nothing_can_be_dropped(tiny_graph: Any, tiny_batch: Any, run: Any, difference: Any) -> None:
    _, graph = tiny_graph("gpt2")
    _, second = find_blocks(graph)
    for name in ("linear_default_5", "linear_default_7"):  # what writes to the stream
        graph.set_weight(graph.op(name), torch.zeros_like(graph.weight(graph.op(name))))
        graph.set_bias(graph.op(name), torch.zeros(32))
    batch = tiny_batch(3, 9, 2)
    expected = run(graph, **batch)
    DropLayers([second])(graph)
    assert difference(run(graph, **batch), expected) < ROUNDING


def test_blocks_of_another_form_or_not_neighbours_are_refused(cached: tuple[Captured, FxGraph]) -> None:
    graph = cached[1].copy()
    one, _, three = find_blocks(graph)
    with pytest.raises(PassContractError, match="does not follow"):
        MergeLayers(one, three, 0.5)(graph)
    graph.set_weight(graph.op(three.owned[-1]), torch.zeros(32, 60))
    _, two, three = find_blocks(graph)
    with pytest.raises(PassContractError, match="another form"):
        MergeLayers(two, three, 0.5)(graph)


@pytest.mark.parametrize("gone", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_the_cache_closes_up(cached: tuple[Captured, FxGraph], difference: Any, gone: tuple[int, ...]) -> None:
    """Prompt and a token behind it give what one go gives, with caches of the layers that are left alone."""
    captured, dense = cached
    graph = dense.copy()
    blocks = find_blocks(graph)
    DropLayers([blocks[i] for i in gone])(graph)
    graph.refresh_shapes()
    left = 3 - len(gone)
    names = [f"past_key_values_{i}_{part}" for i in range(left) for part in ("key", "value")]
    assert list(graph.caches.values()) == names
    pasts = [node.name for node in Execution(graph).inputs if node.name.startswith("past")]
    assert pasts == names
    execution = Execution(graph, caches=True)
    assert len(execution.results) == 1 + 2 * left
    assert captured.cache is not None
    ids, mask = captured.sample["input_ids"], captured.sample["attention_mask"]
    whole = prompt_inputs(captured.cache, ids, mask)
    expected = execution.outputs(whole)
    before = execution.outputs(prompt_inputs(captured.cache, ids[:, :12], mask[:, :12]))
    found = execution.outputs(continued(graph, whole, before[1:], 12))
    assert difference([found[0][1]], [expected[0][1, 12:]]) < ROUNDING
    assert difference(found[1:], expected[1:]) < ROUNDING
