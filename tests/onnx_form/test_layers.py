"""Caches that leave a graph with their layers, and what else makes two nodes unlike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.graph import Kind
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.onnx_form.layers import closed_up

# Three layers' keys; the sum with how many earlier tokens there are, which the first one's tells.
CACHED = """<ir_version: 10, opset_import: ["" : 20]>
cached (float[batch, 2, length, 4] x, float[batch, 2, past, 4] "past.0.key", float[batch, 2, past, 4] "past.1.key",
        float[batch, HEADS, past, 4] "past.2.key")
    => (float[batch, 2, length, 4] y, float[batch, 2, total, 4] "present.0.key", float[batch, 2, total, 4]
        "present.1.key", float[batch, HEADS, total, 4] "present.2.key")
<int64[1] two = {2}> {
    s = Shape("past.0.key")
    n = Gather(s, two)
    c = Cast <to = 1> (n)
    y = Add(x, c)
    "present.0.key" = Concat <axis = 2> ("past.0.key", x)
    d = Neg(x)
    "present.1.key" = Concat <axis = 2> ("past.1.key", d)
    e = Exp(x)
    "present.2.key" = Concat <axis = 2> ("past.2.key", e)
}"""
SCORES = """<ir_version: 10, opset_import: ["" : 20]>
attention (float[batch, 2, length, 4] q, float[batch, 2, 4, length] k, float[batch, 2, length, 4] v)
    => (float[batch, 2, length, 4] y, float[batch, 2, length, 4] z)
<float half = {0.5}, float other = {OTHER}> {
    a = MatMul(q, k)
    b = Mul(a, half)
    c = Softmax <axis = -1> (b)
    y = MatMul(c, v)
    d = MatMul(q, k)
    e = Mul(d, other)
    f = Softmax <axis = -1> (e)
    z = MatMul(f, v)
}"""


@pytest.fixture
def cached(onnx_graph: Callable[..., OnnxGraph]) -> OnnxGraph:
    return onnx_graph(CACHED.replace("HEADS", "2"), {})


@pytest.mark.parametrize(("gone", "kept"), [((0,), (1, 2)), ((1,), (0, 2)), ((0, 1), (2,)), ((1, 2), (0,))])
def test_the_numbers_close_up(cached: OnnxGraph, run: Any, gone: tuple[int, ...], kept: tuple[int, ...]) -> None:
    cached.remove_caches([f"present.{i}.key" for i in gone])
    graph = cached.model.graph
    assert [value.name for value in graph.inputs] == ["x", *(f"past.{i}.key" for i in range(len(kept)))]
    assert [value.name for value in graph.outputs] == ["y", *(f"present.{i}.key" for i in range(len(kept)))]
    assert cached.caches == {f"present.{i}.key": f"past.{i}.key" for i in range(len(kept))}
    x, past = torch.randn(1, 2, 3, 4), torch.zeros(1, 2, 5, 4)
    given = {"x": x, **{f"past.{i}.key": past for i in range(len(kept))}}
    torch.testing.assert_close(run(cached, **given), x + 5)
    spelled = {0: None, 1: "Neg", 2: "Exp"}
    for place, layer in enumerate(kept):
        before = cached.producer(cached.op(f"present.{place}.key").inputs[1])
        assert (None if before is None else before.spelling) == spelled[layer]


def test_a_cache_that_more_than_its_layer_reads_stays(onnx_graph: Any) -> None:
    graph = onnx_graph(CACHED.replace("HEADS", "2").replace("d = Neg(x)", 'd = Add(x, "past.0.key")'), {})
    with pytest.raises(NothingToSlimError, match=r"past\.0\.key is read by more than its own layer"):
        graph.remove_caches(["present.0.key"])


def test_the_length_is_told_by_a_cache_of_the_same_sizes(onnx_graph: Any) -> None:
    graph = onnx_graph(CACHED.replace("HEADS", "3").replace("e = Exp(x)", "e = Concat <axis = 1> (x, x)"), {})
    with pytest.raises(NothingToSlimError, match="the depth of the model cannot change"):
        graph.remove_caches(["present.0.key", "present.1.key"])


def test_numbers_that_had_gaps_keep_them() -> None:
    names = ["past_key_values.1.key", "past_key_values.5.key", "past_key_values.9.key", "state"]
    assert list(closed_up(names, ["past_key_values.3.key", "present.3.key"]).values()) == [
        "past_key_values.1.key",
        "past_key_values.4.key",
        "past_key_values.8.key",
        "state",
    ]


@pytest.mark.parametrize(("other", "same"), [("0.5", True), ("0.25", False)])
def test_scores_of_another_factor_are_unlike(onnx_graph: Any, other: str, same: bool) -> None:
    """Layers may scale their scores each in its own way, which the view of an attention does not show."""
    graph = onnx_graph(SCORES.replace("OTHER", other), {})
    first, second = (op for op in graph.ops if op.kind is Kind.ATTENTION)
    assert first.attributes == second.attributes
    assert (graph.details(first) == graph.details(second)) == same
