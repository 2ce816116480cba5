"""Heads that attention splits off by itself need not be moved to the front and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from dotresize_fx.export.flatten_heads import flatten_heads

MODEL = """<ir_version: 10, opset_import: ["" : 23]>
g (float[b, s, 12] q, float[b, s, 6] k, float[b, s, 8] v, float[b, s, 3] cos, float[b, s, 3] sin,
   bool[b, 1, s, 1] blind)
=> (float[b, s, 16] out)
<int64[4] queries = {{0, 0, 2, 6}}, int64[4] keys = {{0, 0, 1, 6}}, int64[4] values = {{0, 0, 1, 8}},
 int64[3] merged = {{0, 0, 16}}, float zero = {{0}}>
{{
    q4 = Reshape(q, queries)
    qt = Transpose<perm = [0, 2, 1, 3]>(q4)
    qr = RotaryEmbedding(qt, cos, sin)
    k4 = Reshape(k, keys)
    kt = Transpose<perm = [0, 2, 1, 3]>(k4)
    kr = RotaryEmbedding(kt, cos, sin)
    v4 = Reshape(v, values)
    vt = Transpose<perm = {order}>(v4)
    attended = Attention<scale = 0.5>(qr, kr, vt)
    seen = Where(blind, zero, attended)
    back = Transpose<perm = [0, 2, 1, 3]>(seen)
    out = Reshape(back, merged)
}}"""


def graph(order: str = "[0, 2, 1, 3]") -> onnx_ir.Model:
    """Two queries a KV head, values of another size than keys, rows that see nothing."""
    return ShapeInferencePass()(onnx_ir.from_onnx_text(MODEL.format(order=order))).model


def readable(model: onnx_ir.Model) -> list[str]:
    return [f"{node.op_type}({', '.join(value.name or '' for value in node.inputs[:3])})" for node in model.graph]


@pytest.fixture
def inputs() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    sizes = {"q": 12, "k": 6, "v": 8, "cos": 3, "sin": 3}
    found: dict[str, Any] = {name: draw.normal(size=(2, 5, size)).astype(np.float32) for name, size in sizes.items()}
    return found | {"blind": draw.random((2, 1, 5, 1)) < 0.3}


def test_nothing_is_moved(inputs: dict[str, Any]) -> None:
    model = graph()
    (expected,) = ReferenceEvaluator(onnx_ir.to_proto(model)).run(None, inputs)
    assert flatten_heads(model) == 1
    RemoveUnusedNodesPass()(model)
    assert [text.partition("(")[0] for text in readable(model)] == [
        "RotaryEmbedding",
        "RotaryEmbedding",
        "Attention",
        "Squeeze",
        "Where",
    ]
    assert readable(model)[:2] == ["RotaryEmbedding(q, cos, sin)", "RotaryEmbedding(k, cos, sin)"]
    attention = next(node for node in model.graph if node.op_type == "Attention")
    assert (attention.attributes.get_int("q_num_heads"), attention.attributes.get_int("kv_num_heads")) == (2, 1)
    (found,) = ReferenceEvaluator(onnx_ir.to_proto(model)).run(None, inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # float32, the sums in another order


def test_heads_that_come_otherwise_stay() -> None:
    model = graph(order="[0, 2, 3, 1]")
    before = readable(model)
    assert flatten_heads(model) == 0
    assert readable(model) == before
