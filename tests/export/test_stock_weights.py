"""From a graph's weights back to the model's own names, shapes and packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dotresize_fx.errors import CheckpointError
from dotresize_fx.export.stock_weights import StockWeights
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.regions import RegionKind

EVERY = ("llama", "qwen2", "qwen3", "mixtral", "gemma", "phi", "phi3", "neox", "gpt2", "opt", "bert")


@pytest.mark.parametrize("kind", EVERY)
def test_a_canonical_graph_gives_the_models_own_state_dict(tiny_graph: Any, kind: str) -> None:
    model, graph = tiny_graph(kind)
    weights = StockWeights(model, graph)
    found, stored = weights.of(graph.copy()), model.state_dict()
    assert found.keys() == stored.keys()
    for key, tensor in stored.items():
        # A gain of one plus a weight was rounded once on its way there.
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6 if kind == "gemma" else 0)
    assert weights.tied(graph)


def test_keys_of_a_width_are_the_weights_that_have_it(tiny_graph: Any) -> None:
    from dotresize_fx.passes.find_regions import find_regions

    model, graph = tiny_graph("gpt2")
    weights = StockWeights(model, graph)
    region = next(iter(find_regions(graph).of_kind(RegionKind.FFN)))
    stem = "transformer.h.0.mlp."
    # The reader's bias has the stream's width.
    assert weights.keys(region) == {f"{stem}c_fc.weight", f"{stem}c_fc.bias", f"{stem}c_proj.weight"}


def test_a_weight_that_changed_comes_out_changed_where_it_is_packed(tiny_graph: Any) -> None:
    model, graph = tiny_graph("phi3")
    weights, key = StockWeights(model, graph), "model.layers.0.mlp.gate_up_proj.weight"
    op = next(op for op in graph.ops if op.weight and graph.parameter_name(op.weight) == graph.packings[key].parts[1])
    graph.set_weight(op, torch.zeros(40, 32))
    found = weights.of(graph)[key]
    assert found.shape == (104, 32)  # gate, whole, over up
    assert torch.equal(found[:64], model.state_dict()[key][:64])
    assert not found[64:].any()


def test_refuses_a_bias_that_no_module_has(tiny_graph: Any) -> None:
    model, graph = tiny_graph("llama")
    weights = StockWeights(model, graph)
    op = next(op for op in graph.ops if op.is_linear)
    graph.set_bias(op, torch.zeros(len(graph.weight(op))))
    weights.of(graph)  # adding nothing
    graph.set_bias(graph.op(op.name), torch.ones(len(graph.weight(op))))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight: it has a bias now, the stock module none"):
        weights.of(graph)


def test_refuses_a_parameter_that_went_into_another(trace: Any) -> None:
    scaled = torch.nn.Linear(4, 4)
    graph = trace(lambda module, x: module.scaled(x) * module.scale, (2, 4), scaled=scaled, scale=_vector())
    model = torch.nn.Module()
    model.scaled, model.scale = scaled, _vector()
    canonicalise(graph)
    with pytest.raises(CheckpointError, match=r"scaled\.\w+: it went into another weight"):
        StockWeights(model, graph)


def test_refuses_layers_that_share_a_weight_no_more(tiny_graph: Any) -> None:
    model, graph = tiny_graph("llama")
    weights = StockWeights(model, graph)
    head = next(op for op in reversed(graph.ops) if op.is_linear)
    assert weights.tied(graph)
    graph.set_weight(head, 2 * graph.weight(head))
    found = weights.of(graph)
    assert not weights.tied(graph)  # the head has a name of its own in the model: so it can have its own weight
    assert torch.equal(found["lm_head.weight"], 2 * found["model.embed_tokens.weight"])


def _vector() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((4,), 0.5))
