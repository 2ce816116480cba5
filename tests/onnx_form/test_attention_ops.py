"""Ops that are a whole attention: which widths are regions, the proof, and what a cut makes of what they state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.prove_exactness import BOUND, BROKEN, map_regions
from dotresize_fx.passes.truncate_regions import truncate_regions
from dotresize_fx.region_map import random_admissible_map, random_wrong_map

pytest.importorskip("onnxruntime")

LINEARS = """
    q = MatMul(x, "q.weight")
    k = MatMul(x, "k.weight")
    v = MatMul(x, "v.weight")"""
HEAD = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>\nattends'
SHAPES = {"q.weight": (32, 16), "k.weight": (16, 16), "v.weight": (16, 16), "o.weight": (16, 32)}
SPELLINGS = {
    "MultiHeadAttention": """(float[batch, length, 16] x) => (float[batch, length, 16] y) {LINEARS
        m = com.microsoft.MultiHeadAttention <num_heads = 4> (q, k, v)""",
    "Attention": """(float[batch, length, 16] x) => (float[batch, length, 16] y) {LINEARS
        m = Attention <q_num_heads = 4, kv_num_heads = 2, is_causal = 1> (q, k, v)""",
    "GroupQueryAttention": """(float[batch, length, 16] x, int32[batch] last, int32 total)
        => (float[batch, length, 16] y) {LINEARS
        m = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (q, k, v, , , last, total)""",
}
FOUND = {
    "MultiHeadAttention": {"value": 8, "query_key": 8, "kv_heads": 4},
    "Attention": {"value": 8, "query_key": 8, "kv_heads": 2},
    "GroupQueryAttention": {"kv_heads": 2},
}


@pytest.fixture(params=SPELLINGS)
def attends(request: pytest.FixtureRequest, onnx_graph: Any) -> tuple[str, Any]:
    """(name of the op, graph with random weights)."""
    name = request.param
    text = SPELLINGS[name].replace("LINEARS", LINEARS) + '\n        y = MatMul(m, "o.weight")\n    }'
    torch.manual_seed(0)
    shared = name != "MultiHeadAttention"
    shapes = {weight: shape if shared or weight == "o.weight" else (32, 16) for weight, shape in SHAPES.items()}
    return name, onnx_graph(HEAD + text, {weight: torch.randn(shape) / 4 for weight, shape in shapes.items()})


def inputs(name: str) -> dict[str, torch.Tensor]:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    if name != "GroupQueryAttention":
        return {"x": x}
    return {"x": x, "last": torch.tensor([4, 4], dtype=torch.int32), "total": torch.tensor(5, dtype=torch.int32)}


def test_regions_of_the_op_are_exact(attends: tuple[str, Any], run: Any, difference: Any) -> None:
    name, graph = attends
    expected = run(graph, **inputs(name))
    report = find_regions(graph)
    assert {str(region.kind): region.width for region in report.regions} == FOUND[name]
    if name == "GroupQueryAttention":
        one_size = "GroupQueryAttention takes query, key and value heads of one size alone"
        assert {reason for _, reason in report.refused} == {one_size}
    for kind in FOUND[name]:
        for draw in (random_admissible_map, random_wrong_map):
            mapped = graph.copy()
            assert map_regions(mapped, (kind,), draw) == 1
            error = difference(run(mapped, **inputs(name)), expected)
            assert error >= BROKEN if draw is random_wrong_map else error <= BOUND


def test_a_cut_runs_with_fewer_or_smaller_heads(attends: tuple[str, Any], run: Any) -> None:
    name, graph = attends
    for kind, width in FOUND[name].items():
        (region,) = find_regions(graph).of_kind(kind)
        slim: Any = truncate_regions(graph, [region], {region.name: width // 2})
        node = next(node for node in slim.model.graph if node.op_type == name)
        counts = [node.attributes[key].as_int() for key in node.attributes if key.endswith("num_heads")]
        whole = [4] if name == "MultiHeadAttention" else [4, 2]
        assert counts == ([count // 2 for count in whole] if kind == "kv_heads" else whole)
        if kind == "query_key":
            assert node.attributes["scale"].as_float() == pytest.approx(8**-0.5)
        assert run(slim, **inputs(name)).shape == (2, 5, 16)
