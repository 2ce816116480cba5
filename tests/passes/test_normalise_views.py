"""Views by a detour, or of two things at once, as the passes know them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.passes.normalise_views import NormaliseViews

onnxruntime = pytest.importorskip("onnxruntime")

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
TURNED = """turned (float[batch, 2, length, 4] k) => (float[batch, 2, 4, length] y)
<int64[3] rows = {-1, LENGTH, 4}, int64[4] apart = {-1, 2, 4, LENGTH}> {
    a = Reshape(k, rows)
    b = Transpose <perm = [0, 2, 1]> (a)
    c = Reshape(b, apart)
    y = Relu(c)
}"""
JOINED = """joined (float[batch, length, 2, 4] x) => (float[rows, 8] y)
<int64[2] rows = {-1, 8}> {
    a = Reshape(x, rows)
    y = Relu(a)
}"""


def graph_of(text: str) -> OnnxGraph:
    return OnnxGraph(ir.from_proto(onnx.parser.parse_model(HEAD + text)))


def run(graph: OnnxGraph, array: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    data = ir.to_proto(graph.model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: array})
    return np.asarray(result)


def text(graph: OnnxGraph) -> list[str]:
    return [
        f"{op.name} = {op.spelling}({', '.join(v.name for v in op.inputs if not v.is_parameter)})" for op in graph.ops
    ]


def test_keys_turned_round_over_joined_axes_are_one_permutation() -> None:
    graph = graph_of(TURNED.replace("LENGTH", "3").replace("length", "3"))
    array = np.random.default_rng(0).standard_normal((2, 2, 3, 4)).astype(np.float32)
    expected = run(graph, array)
    assert NormaliseViews()(graph).modified
    assert text(graph) == ["c = Transpose(k)", "y = Relu(c)"]
    assert graph.op("c").attributes["order"] == (0, 1, 3, 2)
    assert np.array_equal(run(graph, array), expected)


def test_heads_are_joined_before_rows() -> None:
    graph = graph_of(JOINED)
    array = np.random.default_rng(0).standard_normal((2, 3, 2, 4)).astype(np.float32)
    expected = run(graph, array)
    assert NormaliseViews()(graph).modified
    assert text(graph) == ["a_joined = Reshape(x)", "a = Reshape(a_joined)", "y = Relu(a)"]
    assert graph.op("a_joined").output.shape == ("batch", "length", 8)
    assert np.array_equal(run(graph, array), expected)


@pytest.mark.parametrize("order", ["[1, 2, 0]", "[0, 1, 2]"])
def test_another_permutation_is_left_alone(order: str) -> None:
    turned = TURNED.replace("LENGTH", "3").replace("length", "3").replace("[0, 2, 1]", order)
    assert not NormaliseViews()(graph_of(turned)).modified
