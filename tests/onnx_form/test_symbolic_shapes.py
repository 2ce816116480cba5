"""Sizes by name through computed reshapes, and what follows from fixed sizes as constants."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dotresize_fx.graph import Graph
from dotresize_fx.onnx_form.sizes import broadcast, quotient, total
from dotresize_fx.passes.fold_constants import FoldConstants

pytest.importorskip("onnxruntime")

# As TorchScript spells heads: every size is read from a tensor, the width too.
HEADS = """<ir_version: 10, opset_import: ["" : 17]>
heads (float[batch, length, 8] x) => (float[batch, length, 8] y)
<int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64[1] first = {0}, int64[1] four = {4}, int64[1] open = {-1}> {
    s = Shape(x)
    b0 = Gather(s, zero)
    b = Unsqueeze(b0, first)
    l0 = Gather(s, one)
    l = Unsqueeze(l0, first)
    w0 = Gather(s, two)
    w = Unsqueeze(w0, first)
    f = Cast <to = 1> (w0)
    root = Sqrt(f)
    parted = Concat <axis = 0> (b, l, open, four)
    h = Reshape(x, parted)
    t = Transpose <perm = [0, 2, 1, 3]> (h)
    d = Div(t, root)
    back = Transpose <perm = [0, 2, 1, 3]> (d)
    joined = Concat <axis = 0> (b, l, w)
    r = Reshape(back, joined)
    y = Relu(r)
}"""


def sizes(graph: Graph) -> dict[str, tuple[int | str, ...]]:
    return {op.name: op.output.shape for op in graph.ops}


def test_a_computed_reshape_keeps_the_names_of_sizes(onnx_graph: Any) -> None:
    found = sizes(onnx_graph(HEADS, {}))
    assert found["h"] == ("batch", "length", 2, 4)
    assert found["t"] == ("batch", 2, "length", 4)
    assert found["r"] == ("batch", "length", 8)


def test_fixed_sizes_and_what_follows_from_them_are_stored(onnx_graph: Any, run: Any) -> None:
    graph = onnx_graph(HEADS, {})
    x = torch.randn(3, 5, 8)
    expected = run(graph, x=x)
    result = FoldConstants()(graph)
    assert {record.partition(":")[0] for record in result.records} == {"w0", "w", "f", "root"}
    views = {op.name: op.attributes["sizes"] for op in graph.ops if op.name in ("h", "r")}
    assert views == {"h": (None, None, -1, 4), "r": (None, None, 8)}
    assert graph.op("d").attributes["number"] == pytest.approx(8**-0.5)
    assert torch.equal(run(graph, x=x), expected)


def test_a_view_is_resized_where_it_states_a_size(onnx_graph: Any, run: Any) -> None:
    graph = onnx_graph(HEADS, {})
    FoldConstants()(graph)
    graph.resize_axes(graph.op("h"), {3: 2})
    assert graph.op("h").attributes["sizes"] == (None, None, -1, 2)
    assert sizes(graph)["h"] == ("batch", "length", 4, 2)
    assert run(graph, x=torch.randn(3, 5, 8)).shape == (3, 5, 8)


def test_sizes_are_reckoned_with_by_name() -> None:
    assert quotient(("b", "n", 32), ("b", "n", 8)) == 4
    assert quotient(("b", 4, "n"), (4,)) == "b*n"
    assert quotient(("b", 3), (2,)) == "(b*3)/(2)"
    assert total(("past", "n", 0)) == total(("n", "past")) == "n + past"
    assert broadcast(("b", 1, "n"), (4, 1)) == ("b", 4, "n")
