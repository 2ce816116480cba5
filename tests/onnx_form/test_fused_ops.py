"""Fused ops taken apart, as readable graphs, and put together again: as they were, or with what a cut made of them."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch

from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.prove_exactness import BOUND, BROKEN, map_regions
from dotresize_fx.passes.truncate_regions import truncate_regions
from dotresize_fx.region_map import random_admissible_map, random_wrong_map

pytest.importorskip("onnxruntime")

BLOCK = """<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>
block (float[batch, length, 16] x, int32[batch, length] mask) => (float[batch, length, 16] y) {
    a = com.microsoft.Attention <num_heads = 4> (x, "qkv.weight", "qkv.bias", mask)
    o = MatMul(a, "o.weight")
    n, , , s = com.microsoft.SkipLayerNormalization <epsilon = 0.00001> (o, x, "n.weight", "n.bias", "o.bias")
    h = MatMul(n, "up.weight")
    g = com.microsoft.BiasGelu(h, "up.bias")
    d = MatMul(g, "down.weight")
    y = com.microsoft.SkipLayerNormalization <epsilon = 0.00001> (d, s, "m.weight", "m.bias", "down.bias")
}"""
SHAPES = {"qkv.weight": (48, 16), "o.weight": (16, 16), "up.weight": (24, 16), "down.weight": (16, 24)}
SHAPES |= {"qkv.bias": (48,), "o.bias": (16,), "up.bias": (24,), "down.bias": (16,)}
SHAPES |= {"n.weight": (16,), "n.bias": (16,), "m.weight": (16,), "m.bias": (16,)}
INPUTS = {
    "x": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)),
    "mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.int32),
}


def listed(model: ir.Model) -> list[str]:
    """One line a node."""
    return [
        f"{', '.join(value.name or '' for value in node.outputs)} = {node.op_type}"
        f"({', '.join(value.name or '' if value is not None else '' for value in node.inputs)})"
        for node in model.graph
    ]


@pytest.fixture
def block(onnx_graph: Any) -> OnnxGraph:
    torch.manual_seed(0)
    graph: OnnxGraph = onnx_graph(BLOCK, {name: torch.randn(shape) / 3 for name, shape in SHAPES.items()})
    return graph


def test_parts_are_ops_that_the_view_knows(block: OnnxGraph) -> None:
    assert listed(block.model) == [
        "a_query = MatMul(x, qkv.weight.query)",
        "a_query_shifted = Add(a_query, qkv.bias.query)",
        "a_key = MatMul(x, qkv.weight.key)",
        "a_key_shifted = Add(a_key, qkv.bias.key)",
        "a_value = MatMul(x, qkv.weight.value)",
        "a_value_shifted = Add(a_value, qkv.bias.value)",
        "a = MultiHeadAttention(a_query_shifted, a_key_shifted, a_value_shifted, , mask)",
        "o = MatMul(a, o.weight)",
        "n_shifted = Add(o, o.bias)",
        "s = Add(n_shifted, x)",
        "n = LayerNormalization(s, n.weight, n.bias)",
        "h = MatMul(n, up.weight)",
        "g_shifted = Add(h, up.bias)",
        "g = Gelu(g_shifted)",
        "d = MatMul(g, down.weight)",
        "y_shifted = Add(d, down.bias)",
        "y_total = Add(y_shifted, s)",
        "y = LayerNormalization(y_total, m.weight, m.bias)",
    ]


def test_put_together_it_is_as_it_was(block: OnnxGraph, run: Any, difference: Any) -> None:
    expected = run(block, **INPUTS)
    block.remove_dead()
    fused = block.fused_model()
    assert listed(fused) == [
        "a = Attention(x, qkv.weight, qkv.bias, mask)",
        "o = MatMul(a, o.weight)",
        "n, , , s = SkipLayerNormalization(o, x, n.weight, n.bias, o.bias)",
        "h = MatMul(n, up.weight)",
        "g = BiasGelu(h, up.bias)",
        "d = MatMul(g, down.weight)",
        "y = SkipLayerNormalization(d, s, m.weight, m.bias, down.bias)",
    ]
    assert {name: tuple(value.shape) for name, value in fused.graph.initializers.items()} == {
        name: shape[::-1] for name, shape in SHAPES.items()
    }
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) / 3 for name, shape in SHAPES.items()}
    stored = fused.graph.initializers["qkv.weight"].const_value
    assert stored is not None
    assert torch.equal(torch.from_numpy(stored.numpy()), weights["qkv.weight"].T)
    again = ir.from_proto(ir.to_proto(fused))
    assert difference(run(OnnxGraph(again), **INPUTS), expected) <= BOUND


def test_a_norm_whose_statistics_are_read_stays(onnx_graph: Any) -> None:
    text = """<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>
    read (float[batch, length, 16] x) => (float[batch, length, 16] y, float[batch, length, 1] mean) {
        y, mean = com.microsoft.SkipLayerNormalization(x, x, "n.weight")
    }"""
    graph = onnx_graph(text, {"n.weight": torch.ones(16)})
    assert [node.op_type for node in graph.model.graph] == ["SkipLayerNormalization"]


@pytest.mark.parametrize("kind", ["ffn", "value", "query_key", "kv_heads"])
def test_regions_across_fused_ops_are_exact_and_stay_fused(
    block: OnnxGraph, run: Any, difference: Any, kind: str
) -> None:
    expected = run(block, **INPUTS)
    for draw in (random_admissible_map, random_wrong_map):
        mapped = block.copy()
        assert map_regions(mapped, (kind,), draw) == 1
        fused = ir.from_proto(ir.to_proto(mapped.fused_model()))
        assert sum(node.domain == "com.microsoft" for node in fused.graph) == 4
        error = difference(run(Whole(fused), **INPUTS), expected)
        assert error >= BROKEN if draw is random_wrong_map else error <= BOUND


class Whole:
    """A model to be run as it is, without being taken apart."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model


def test_a_cut_is_written_into_the_fused_ops(block: OnnxGraph, run: Any) -> None:
    graph: Any = block
    for kind in ("value", "kv_heads", "ffn"):
        (region,) = find_regions(graph).of_kind(kind)
        graph = truncate_regions(graph, [region], {region.name: region.width // 2})
    fused = graph.fused_model()
    attention = next(node for node in fused.graph if node.op_type == "Attention")
    assert list(attention.attributes["qkv_hidden_sizes"].as_ints()) == [8, 8, 4]
    assert attention.attributes["num_heads"].as_int() == 2
    shapes = {name: tuple(value.shape) for name, value in fused.graph.initializers.items()}
    assert shapes["qkv.weight"] == (16, 20)
    assert shapes["qkv.bias"] == (20,)
    assert shapes["up.bias"] == (12,)
    assert run(Whole(fused), **INPUTS).shape == (2, 5, 16)
