"""Edits of ONNX graphs, one by one, confirmed by ONNX Runtime."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from dotresize_fx.graph import Graph, Kind
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.passes.centre_layer_norms import CentreLayerNorms
from dotresize_fx.passes.drop_no_ops import DropNoOps
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.fold_norm_gains import FoldNormGains
from dotresize_fx.region_map import RegionMap, random_admissible_map, selection
from dotresize_fx.regions import Region

pytest.importorskip("onnxruntime")

WIDTH, INNER, VOCAB = 8, 12, 20
EXACT = 1e-5  # of the largest output: float32 with a factor of ten to spare; the design's bound for ratio 0


def region_of(graph: Graph, kind: str) -> Region:
    return next(find_regions(graph).of_kind(kind))


def named(graph: Graph, name: str) -> Any:
    """The op of this name, untyped, since its weight is known to be there."""
    return graph.op(name)


def test_a_shared_initializer_is_forked_when_one_user_changes(onnx_graph: Any, run: Any, difference: Any) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    shared (float[batch, 8] x) => (float[batch, 8] y) {
        a0 = MatMul(x, "w")
        a = Add(a0, "b")
        r = Relu(a)
        c0 = MatMul(r, "w")
        c = Add(c0, "b")
        y = MatMul(c, "w")
    }"""
    weight, bias, x = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH), torch.randn(3, WIDTH)
    graph = onnx_graph(text, {"w": weight, "b": bias})
    assert [op.name for op in graph.users(named(graph, "a").weight)] == ["a", "c", "y"]
    kept = graph.model.graph.initializers["w"].const_value
    other, shift = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)
    graph.set_weight(graph.op("c"), other)
    graph.set_bias(graph.op("c"), shift)
    assert graph.model.graph.initializers["w"].const_value is kept
    linear = nn.functional.linear
    expected = linear(linear(linear(x, weight, bias).relu(), other, shift), weight)
    assert difference(run(graph, x=x), expected) <= EXACT
    graph.set_weight([graph.op("a"), graph.op("y")], weight.T)  # all that still share it: it stays one, in place
    assert sorted(graph.model.graph.initializers) == ["b", "b_1", "w", "w_1"]
    assert named(graph, "a").weight.name == named(graph, "y").weight.name == "w"
    expected = linear(linear(linear(x, weight.T, bias).relu(), other, shift), weight.T)
    assert difference(run(graph, x=x), expected) <= EXACT


@pytest.mark.parametrize("opset", [18, 23])
def test_layer_norms_lose_their_gain_and_become_rms_norms(
    onnx_graph: Any, run: Any, difference: Any, insert_and_fold: Any, opset: int
) -> None:
    text = f"""<ir_version: 10, opset_import: ["" : {opset}]>
    normed (int64[batch] ids) => (float[batch, 12] y) {{
        x = Gather("embed.weight", ids)
        n = LayerNormalization <epsilon = 0.001> (x, "norm.weight", "norm.bias")
        y = MatMul(n, "up.weight")
    }}"""
    weights = {"embed.weight": torch.randn(VOCAB, WIDTH), "up.weight": torch.randn(INNER, WIDTH)}
    weights |= {"norm.weight": torch.rand(WIDTH) + 0.5, "norm.bias": torch.randn(WIDTH)}
    graph = onnx_graph(text, weights, ("embed.weight",))
    ids = torch.arange(VOCAB)
    expected = run(graph, ids=ids)
    region = region_of(graph, "residual")
    for rewrite in (FoldNormGains(region), CentreLayerNorms(region)):
        rewrite(graph)
        assert difference(run(graph, ids=ids), expected) <= EXACT
    norm = graph.op("n")
    assert (norm.kind, norm.weight, norm.bias) == (Kind.RMS_NORM, None, None)
    assert norm.attributes["epsilon"] == pytest.approx(0.001)
    rotation = random_admissible_map(region_of(graph, "residual"), torch.Generator().manual_seed(3))
    insert_and_fold(graph, region_of(graph, "residual"), rotation)
    assert difference(run(graph, ids=ids), expected) <= EXACT


RESHAPED = """<ir_version: 10, opset_import: ["" : 20]>
reshaped (float[batch, length, 8] x) => (float[batch, length, 8] y)
<int64[2] flat = {-1, 12}, int64[1] inner = {12}, int64[1] zero = {0}> {
    h0 = MatMul(x, "up.weight")
    f = Reshape(h0, flat)
    once = Relu(f)
    r = Relu(once)
    size = Shape <start = 0, end = 2> (h0)
    back = Concat <axis = 0> (size, inner)
    h = Reshape(r, back)
    y = MatMul(h, "down.weight")
}"""


def test_reshapes_that_keep_the_width_are_crossed_and_resized(
    onnx_graph: Any, run: Any, difference: Any, insert_and_fold: Any, assert_shapes_agree: Any
) -> None:
    weights = {"up.weight": torch.randn(INNER, WIDTH), "down.weight": torch.randn(WIDTH, INNER)}
    graph = onnx_graph(RESHAPED, weights)
    kept = torch.tensor([11, 4, 0, 7])
    region = region_of(graph, "ffn")
    assert region.positive_scale
    chosen = selection(kept, INNER)
    insert_and_fold(graph, region, RegionMap(chosen, chosen.T))
    x = torch.randn(2, 3, WIDTH)
    expected = (x @ weights["up.weight"][kept].T).relu() @ weights["down.weight"][:, kept].T
    assert difference(run(graph, x=x), expected) <= EXACT
    assert {op.output.width for op in graph.ops if op.name in ("h0", "f", "once", "r", "h")} == {len(kept)}
    assert_shapes_agree(graph)


def test_graph_outputs_keep_their_names_when_ops_go(onnx_graph: Any, run: Any) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    named (float[batch, 8] x) => (float[batch, 12] y, float[batch, 12] z) {
        i = Identity(x)
        h = MatMul(i, "up.weight")
        c = Cast <to = 1> (h)
        y = Identity(c)
        z = Dropout(c)
    }"""
    graph = onnx_graph(text, {"up.weight": torch.randn(INNER, WIDTH)})
    x = torch.randn(3, WIDTH)
    expected = run(graph, x=x)
    DropNoOps()(graph)
    assert [(op.name, op.spelling) for op in graph.ops] == [("h", "MatMul"), ("y", "Identity"), ("z", "Dropout")]
    graph.bypass(graph.op("z"))
    assert [(op.name, op.spelling) for op in graph.ops][-1] == ("z", "Identity")
    assert [value.name for value in graph.model.graph.outputs] == ["y", "z"]
    assert torch.equal(run(graph, x=x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_stay_in_their_dtype(insert_and_fold: Any, dtype: torch.dtype) -> None:
    kind = {torch.float16: "float16", torch.bfloat16: "bfloat16"}[dtype]
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    half ({kind}[batch, 8] x) => ({kind}[batch, 8] y) <{kind}[8, 12] up, {kind}[12, 8] down> {{
        h = MatMul(x, up)
        r = Relu(h)
        y = MatMul(r, down)
    }}"""
    proto = onnx.parser.parse_model(text)
    del proto.graph.value_info[:]
    up, down = torch.randn(WIDTH, INNER).to(dtype), torch.randn(INNER, WIDTH).to(dtype)
    for name, tensor in (("up", up), ("down", down)):
        proto.graph.initializer.append(ir.to_proto(ir.tensor(tensor, name=name)))
    graph = OnnxGraph(ir.from_proto(proto))
    assert torch.equal(graph.weight(graph.op("h")), up.T)
    chosen = selection(torch.arange(5), INNER)
    insert_and_fold(graph, region_of(graph, "ffn"), RegionMap(chosen, chosen.T))
    saved = OnnxGraph(ir.from_proto(ir.to_proto(graph.model)))
    assert torch.equal(saved.weight(saved.op("h")), up.T[:5])
    assert torch.equal(saved.weight(saved.op("y")), down.T[:, :5])


def test_what_is_not_edited_stays_as_it_was(stream: Any, insert_and_fold: Any) -> None:
    _, graph = stream()
    model = graph.model
    model.producer_name, model.metadata_props["origin"] = "somebody", "somewhere"
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    nodes = {node.outputs[0].name: (node.op_type, node.name) for node in model.graph}
    region = region_of(graph, "ffn")
    insert_and_fold(graph, region, random_admissible_map(region, torch.Generator().manual_seed(4)))
    after = graph.model.graph.initializers
    assert list(after) == list(before)
    changed = {name for name in before if after[name].const_value is not before[name]}
    assert changed == {"gate.weight", "up.weight", "up.bias", "down.weight"}
    assert {node.outputs[0].name: (node.op_type, node.name) for node in graph.model.graph} == nodes
    assert (graph.model.producer_name, graph.model.metadata_props) == ("somebody", {"origin": "somewhere"})
    assert graph.model.graph.opset_imports == {"": 23}


@pytest.mark.parametrize("columns", [8, 12])
def test_a_parameter_is_set_as_it_is_stored(onnx_graph: Any, run: Any, difference: Any, columns: int) -> None:
    """Of a Gemm that is no linear in the view, since it stands for one of joined rows; a square one too."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
    joined (float[2, 3, 8] x) => (float[2, 3, COLUMNS] y)
    <int64[2] joined = {-1, 8}, int64[3] parted = {2, 3, COLUMNS}> {
        a = Reshape(x, joined)
        b = Gemm(a, "w", "c")
        y = Reshape(b, parted)
    }"""
    shift, x = torch.randn(columns), torch.randn(2, 3, 8)
    graph = onnx_graph(text.replace("COLUMNS", str(columns)), {"w": torch.randn(columns, 8), "c": shift})
    op = graph.op("b")
    assert op.kind is Kind.ADDMM
    new = torch.randn_like(graph.parameter(op.inputs[2]))
    assert new.shape == (8, columns)
    graph.set_parameter(op.inputs[2], new)
    assert torch.equal(graph.parameter(graph.op("b").inputs[2]), new)
    assert difference(run(graph, x=x), x @ new + shift) <= EXACT
