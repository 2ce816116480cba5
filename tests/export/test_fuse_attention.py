"""Attention takes its cache over, and reads KV heads unrepeated."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
import pytest
from onnx.reference import ReferenceEvaluator

from dotresize_fx.export.fuse_attention import fuse_attention

HEAD = """<ir_version: 10, opset_import: ["" : 23]>
g (float[b, 4, s, 6] query, float[b, 2, s, 6] new_key, float[b, 2, s, 3] new_value, float[b, 1, s, t] mask,
   float[b, 2, p, 6] past_key_values_0_key, float[b, 2, p, 3] past_key_values_0_value)
=> (float[b, 4, s, 3] out, float[b, 2, t, 6] key, float[b, 2, t, 3] value{more})
<int64[1] two = {{2}}, int64[5] twice = {{1, 1, 2, 1, 1}}, int64[4] key_heads = {{0, 4, -1, 6}},
 int64[4] value_heads = {{0, 4, -1, 3}}>
{{
    key = Concat<axis = 2>(past_key_values_0_key, new_key)
    value = Concat<axis = 2>(past_key_values_0_value, new_value)
    opened_key = Unsqueeze(key, two)
    wide_key = Expand(opened_key, twice)
    keys = Reshape(wide_key, key_heads)
    opened_value = Unsqueeze(value, two)
    wide_value = Expand(opened_value, twice)
    values = Reshape(wide_value, value_heads)
    out = Attention<scale = 0.5>(query, keys, values, mask)
    {rest}
}}"""
REPEATED = {
    "opened_key": ("b", 2, 1, "t", 6),
    "wide_key": ("b", 2, 2, "t", 6),
    "keys": ("b", 4, "t", 6),
    "opened_value": ("b", 2, 1, "t", 3),
    "wide_value": ("b", 2, 2, "t", 3),
    "values": ("b", 4, "t", 3),
}


def graph(more: str = "", rest: str = "") -> onnx_ir.Model:
    """Two KV heads for four queries, values of another size than keys, behind a past."""
    model = onnx_ir.from_onnx_text(HEAD.format(more=more, rest=rest))
    for node in model.graph:
        for value in node.outputs:
            if value.name in REPEATED:
                value.shape = onnx_ir.Shape(REPEATED[value.name])
    return model


def ran(model: onnx_ir.Model, inputs: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    return list(ReferenceEvaluator(onnx_ir.to_proto(model)).run(None, inputs))


@pytest.fixture
def inputs() -> dict[str, Any]:
    draw = np.random.default_rng(0).normal
    shapes = {
        "query": (2, 4, 3, 6),
        "new_key": (2, 2, 3, 6),
        "new_value": (2, 2, 3, 3),
        "mask": (2, 1, 3, 8),
        "past_key_values_0_key": (2, 2, 5, 6),
        "past_key_values_0_value": (2, 2, 5, 3),
    }
    return {name: draw(size=shape).astype(np.float32) for name, shape in shapes.items()}


def readable(model: onnx_ir.Model) -> list[str]:
    def names(values: Any) -> str:
        return ", ".join(value.name for value in values)

    return [f"{names(node.outputs)} = {node.op_type}({names(node.inputs)})" for node in model.graph]


def test_the_cache_is_its_own_and_heads_are_not_repeated(inputs: dict[str, Any]) -> None:
    model = graph()
    expected = ran(model, inputs)
    assert fuse_attention(model) == 1
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
    assert readable(model) == [
        "out, key, value = Attention(query, new_key, new_value, mask, past_key_values_0_key, past_key_values_0_value)"
    ]
    for one, other in zip(ran(model, inputs), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)  # float32, the sums in another order


def test_a_cache_that_something_else_reads_stays_outside(inputs: dict[str, Any]) -> None:
    model = graph(", float[b, 2, t, 6] shifted", "shifted = Add(key, key)")
    expected = ran(model, inputs)
    assert fuse_attention(model) == 1
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
    assert "out = Attention(query, key, value, mask)" in readable(model)
    for one, other in zip(ran(model, inputs), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_heads_repeated_in_another_order_are_read_as_they_are() -> None:
    model = graph()
    for name, shape in (("opened_key", (1, "b", 2, "t", 6)), ("wide_key", (2, "b", 2, "t", 6))):
        value = next(v for node in model.graph for v in node.outputs if v.name == name)
        value.shape = onnx_ir.Shape(shape)
    before = readable(model)
    assert fuse_attention(model) == 0
    assert readable(model) == before
