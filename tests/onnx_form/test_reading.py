"""What the ONNX form reads: widths that it refuses, with the reason, and the spellings of linears and functions."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from dotresize_fx.graph import Graph, Kind
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.prove_exactness import BOUND, BROKEN, map_regions
from dotresize_fx.region_map import random_admissible_map, random_wrong_map

pytest.importorskip("onnxruntime")

WIDTH, INNER = 8, 12
EXACT = 1e-5  # of the largest output: float32 with a factor of ten to spare; the design's bound for ratio 0


def named(graph: Graph, name: str) -> Any:
    """The op of this name, untyped, since its weight is known to be there."""
    return graph.op(name)


REFUSED = {
    "it is an output of the graph": """(float[batch, 8] x) => (float[batch, 12] h, float[batch, 8] y) {
        h = MatMul(x, "up.weight")
        y = MatMul(h, "down.weight")
    }""",
    "it goes into MatMul": """(float[batch, 8] x) => (float[batch, batch] y) {
        h = MatMul(x, "up.weight")
        x2 = MatMul(x, "up.weight")
        t = Transpose <perm = [1, 0]> (x2)
        y = MatMul(h, t)
    }""",
    "it is split into heads or reshaped": """(float[batch, 8] x) => (float[batch, 8] y) {
        f = MatMul(x, "up.weight")
        g, u = Split <axis = 1, num_outputs = 2> (f)
        s = Sigmoid(g)
        h = Mul(s, u)
        y = MatMul(h, "half.weight")
    }""",
    "it goes into If": """(float[batch, 8] x, bool choose) => (float[batch, 8] y) {
        h = MatMul(x, "up.weight")
        y1 = MatMul(h, "down.weight")
        z = If (choose) <
            then_branch = then () => (float[batch, 12] p) { p = Relu(h) },
            else_branch = otherwise () => (float[batch, 12] q) { q = Neg(h) }
        >
        w = ReduceSum <keepdims = 1> (z)
        y = Add(y1, w)
    }""",
    "it goes into Shape": """(float[batch, 8] x) => (float[batch, 8] y, int64[2] sizes) {
        h = MatMul(x, "up.weight")
        sizes = Shape(h)
        y = MatMul(h, "down.weight")
    }""",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_width_that_is_not_understood_is_refused_with_the_reason(onnx_graph: Any, reason: str) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]>\nrefused ' + REFUSED[reason]
    weights = {"up.weight": torch.randn(INNER, WIDTH), "down.weight": torch.randn(WIDTH, INNER)}
    weights |= {"half.weight": torch.randn(WIDTH, INNER // 2)}
    report = find_regions(onnx_graph(text, {name: w for name, w in weights.items() if name in text}))
    assert not report.regions
    writer = next(match for match in report.linears if match.parameter == "up.weight")
    assert writer.writes_reason.startswith(reason)


@pytest.mark.parametrize(("op", "shape"), [("Mul", (INNER,)), ("Add", (3, INNER))])
def test_a_parameter_that_is_combined_with_a_width_is_permuted_with_it(
    onnx_graph: Any, run: Any, difference: Any, op: str, shape: tuple[int, ...]
) -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    combined (float[3, 8] x) => (float[3, 8] y) {{
        h0 = MatMul(x, "up.weight")
        h1 = Relu(h0)
        h = {op}("table", h1)
        y = MatMul(h, "down.weight")
    }}"""
    shapes = {"up.weight": (INNER, WIDTH), "down.weight": (WIDTH, INNER), "table": shape}
    weights = {name: torch.rand(size) for name, size in shapes.items()}
    expected = run(onnx_graph(text, weights, ("table",)), x=(x := torch.randn(3, WIDTH)))
    for draw in (random_admissible_map, random_wrong_map):
        graph = onnx_graph(text, weights, ("table",))
        assert map_regions(graph, ("ffn",), draw) == 1
        error = difference(run(graph, x=x), expected)
        assert error >= BROKEN if draw is random_wrong_map else error <= BOUND


def test_a_weight_read_in_both_orientations_is_no_linears_weight(onnx_graph: Any) -> None:
    """Its rows and columns would be one dimension; an autoencoder with tied weights must be left alone."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
    tied (float[batch, 8] x) => (float[batch, 8] y) {
        h = MatMul(x, "w")
        r = Relu(h)
        t = Transpose <perm = [1, 0]> ("w")
        y = MatMul(r, t)
    }"""
    graph = onnx_graph(text, {"w": torch.randn(INNER, WIDTH)})
    assert not find_regions(graph).regions
    assert [op.kind for op in graph.ops] == [Kind.OTHER, Kind.POINTWISE, Kind.RESHAPE, Kind.OTHER]


SPELLINGS = {
    "MatMul": 'y = MatMul(x, "w")',
    "MatMul of a Transpose": 't = Transpose("w")\n y = MatMul(x, t)',
    "Gemm": 'y = Gemm(x, "w")',
    "Gemm transB": 'y = Gemm <transB = 1> (x, "w")',
    "Gemm of a Transpose": 't = Transpose("w")\n y = Gemm(x, t)',
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_spellings_of_a_linear_are_one_op_to_read_and_to_edit(
    onnx_graph: Any, run: Any, difference: Any, spelling: str, with_bias: bool
) -> None:
    line = SPELLINGS[spelling]
    if with_bias and "Gemm" in spelling:
        line = line.replace("(x, t)", '(x, t, "b")').replace('(x, "w")', '(x, "w", "b")')
    elif with_bias:
        line = line.replace("y =", "p =") + '\n y = Add("b", p)'
    text = f'<ir_version: 10, opset_import: ["" : 20]>\nm (float[batch, 8] x) => (float[batch, 12] y) {{ {line} }}'
    weight, bias, x = torch.randn(INNER, WIDTH), torch.randn(INNER), torch.randn(3, WIDTH)
    as_torch = ("w",) if "Transpose" in spelling or "transB" in spelling else ()
    graph = onnx_graph(text, {"w": weight, "b": bias} if with_bias else {"w": weight}, as_torch)
    assert [(op.name, op.kind) for op in graph.ops] == [("y", Kind.LINEAR)]
    op = named(graph, "y")
    assert torch.equal(graph.weight(op), weight)
    assert op.weight.shape == (INNER, WIDTH)
    assert graph.users(op.weight) == [op]
    read = graph.bias(op)
    assert torch.equal(read, bias) if read is not None else not with_bias

    other = torch.randn(INNER, WIDTH)
    graph.set_weight(op, other)
    for shift in (None, bias, 2 * bias):
        graph.set_bias(named(graph, "y"), shift)
        expected = nn.functional.linear(x, other, shift)
        assert [(op.name, op.kind) for op in graph.ops] == [("y", Kind.LINEAR)]
        assert difference(run(graph, x=x), expected) <= EXACT
    onnx.checker.check_model(ir.to_proto(graph.model), full_check=True)


def test_numbers_and_functions_are_read_as_in_torch(onnx_graph: Any) -> None:
    text = """<ir_version: 10, opset_import: ["" : 24, "com.microsoft" : 1]>
    m (float[batch, 8] x) => (float[batch, 8] y) <float two = {2.0}, float[1] half = {0.5}, float one = {1.0}> {
        a = Sub(x, two)
        b = Sub(two, a)
        c = Div(b, half)
        d = Div(one, c)
        e = Pow(d, two)
        f = Mul(half, e)
        g = Swish(f)
        h = com.microsoft.QuickGelu(g)
        i = Neg(h)
        y = Clip(i, half, two)
    }"""
    read = [(op.kind.value, op.function, op.attributes["number"]) for op in onnx_graph(text, {}).ops]
    assert read == [
        ("pointwise", "add", -2.0),
        ("pointwise", "rsub", 2.0),
        ("scale", "", 2.0),
        ("pointwise", "reciprocal", 1.0),
        ("pointwise", "pow", 2.0),
        ("scale", "", 0.5),
        ("pointwise", "silu", None),
        ("pointwise", "quick_gelu", None),
        ("scale", "", -1),
        ("pointwise", "clamp", None),
    ]
