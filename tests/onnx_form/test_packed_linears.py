"""Packed linears are seen as one a part, and written as one product again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.truncate_regions import truncate_regions

pytest.importorskip("onnxruntime")

GATED = """<ir_version: 10, opset_import: ["" : 20]>
gated (float[batch, length, 8] x) => (float[batch, length, 8] y) <int64[2] sizes = {12, 12}> {
    p0 = MatMul(x, "packed.weight")
    p = Add(p0, "packed.bias")
    g, u = Split <axis = -1> (p, sizes)
    s = Sigmoid(g)
    a = Mul(g, s)
    h = Mul(a, u)
    y = MatMul(h, "down.weight")
}"""
SHAPES = {"packed.weight": (24, 8), "packed.bias": (24,), "down.weight": (8, 12)}


@pytest.fixture
def gated(onnx_graph: Any) -> tuple[dict[str, torch.Tensor], Any]:
    weights = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in SHAPES.items()}
    return weights, onnx_graph(GATED, weights)


def test_what_is_not_cut_is_written_as_it_was(gated: tuple[Any, Any], run: Any, difference: Any) -> None:
    weights, graph = gated
    x = torch.randn(2, 3, 8)
    expected = run(graph, x=x)
    canonicalise(graph, check=True)
    assert len(list(find_regions(graph).of_kind("ffn"))) == 1
    model = graph.fused_model()
    assert [node.op_type for node in model.graph] == ["MatMul", "Add", "Split", "Sigmoid", "Mul", "Mul", "MatMul"]
    stored = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert torch.equal(torch.from_numpy(stored["packed.weight"].numpy()), weights["packed.weight"].T)
    assert torch.equal(torch.from_numpy(stored["packed.bias"].numpy()), weights["packed.bias"])
    assert torch.equal(run(type(graph)(model), x=x), expected)


def test_a_cut_narrows_the_packed_product(gated: tuple[Any, Any], run: Any, difference: Any) -> None:
    _, graph = gated
    canonicalise(graph, check=True)
    (region,) = find_regions(graph).of_kind("ffn")
    slim: Any = truncate_regions(graph, [region], {region.name: 5})
    x = torch.randn(2, 3, 8)
    model = slim.fused_model()
    shapes = {name: tuple(value.shape) for name, value in model.graph.initializers.items()}
    assert shapes["packed.weight"] == (8, 10)
    assert shapes["packed.bias"] == (10,)
    assert shapes["down.weight"] == (5, 8)
    assert difference(run(type(graph)(model), x=x), run(slim, x=x)) <= 1e-6  # one product for two: rounding alone
