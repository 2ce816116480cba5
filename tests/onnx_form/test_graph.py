"""The ONNX form of the neutral view: the regions of its torch.fx twin, and maps that ONNX Runtime confirms."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Graph, Kind
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.passes.drop_no_ops import DropNoOps
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.fold_norm_gains import FoldNormGains
from dotresize_fx.passes.recognise_norms import RecogniseNorms
from dotresize_fx.region_map import RegionMap, random_admissible_map, random_wrong_map, selection
from dotresize_fx.regions import Region

pytest.importorskip("onnxruntime")

WIDTH, INNER, VOCAB = 8, 12, 20
EXACT = 1e-5  # of the largest output: float32 with a factor of ten to spare; the design's bound for ratio 0


def fx_graph(module: nn.Module, sample: torch.Tensor) -> FxGraph:
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=64)
    program = torch.export.export(module, (sample,), dynamic_shapes=({0: batch, 1: length},))
    return FxGraph(program)


def summary(graph: Graph) -> list[dict[str, Any]]:
    """Every region in words that both forms share: parameter names instead of op names."""

    def parameters(names: tuple[str, ...]) -> list[str]:
        weights = [graph.op(name).weight for name in names]
        return [graph.parameter_name(weight) for weight in weights if weight is not None]

    return [
        {
            "kind": region.kind,
            "symmetry": region.symmetry,
            "width": region.width,
            "writers": parameters(region.writers),
            "readers": parameters(region.readers),
            "norms": parameters(region.norms),
            "normed": parameters(region.normed_readers),
            "linear_branch": parameters(region.linear_branch),
            "positive_scale": region.positive_scale,
        }
        for region in find_regions(graph).regions
    ]


def dump(graph: Graph) -> str:
    lines = []
    for op in graph.ops:
        owned = [f"{v.name}{list(v.shape)}" for v in (op.weight, op.bias) if v is not None]
        inputs = ", ".join([*(value.name for value in op.inputs), *owned])
        lines.append(f"{op.name}{list(op.output.shape)} = {op.kind} {op.function}({inputs})".replace(" (", "("))
    return "\n".join(lines).replace("'", "")


def region_of(graph: Graph, kind: str) -> Region:
    return next(find_regions(graph).of_kind(kind))


def named(graph: Graph, name: str) -> Any:
    """The op of this name, untyped, since its weight is known to be there."""
    return graph.op(name)


IDS = torch.tensor([[1, 5, 7, 2, 19], [0, 3, 3, 11, 4]])


def test_gated_block_reads_as_ops_of_the_view(gated: tuple[nn.Module, OnnxGraph]) -> None:
    assert dump(gated[1]) == "\n".join(
        (
            "g[batch, length, 12] = linear(x, gate.weight[12, 8])",
            "s[batch, length, 12] = pointwise sigmoid(g)",
            "a[batch, length, 12] = mul(g, s)",
            "u[batch, length, 12] = linear(x, up.weight[12, 8], up.bias[12])",
            "h[batch, length, 12] = mul(a, u)",
            "y[batch, length, 8] = linear(h, down.weight[8, 12], down.bias[8])",
        )
    )


def test_gated_block_has_the_regions_of_its_fx_twin(gated: tuple[nn.Module, OnnxGraph]) -> None:
    module, graph = gated
    twin = fx_graph(module, torch.randn(2, 3, WIDTH))
    for form in (graph, twin):
        DropNoOps()(form)
    assert summary(graph) == summary(twin)
    assert summary(graph) == [
        {
            "kind": "ffn",
            "symmetry": "permutation",
            "width": INNER,
            "writers": ["gate.weight", "up.weight"],
            "readers": ["down.weight"],
            "norms": [],
            "normed": [],
            "linear_branch": ["up.weight"],
            "positive_scale": False,
        }
    ]


def test_gated_block_lets_admissible_maps_through_and_no_others(
    run: Any, difference: Any, insert_and_fold: Any, gated: tuple[nn.Module, OnnxGraph]
) -> None:
    module, graph = gated
    x = torch.randn(3, 5, WIDTH)
    expected = module(x).detach()
    assert difference(run(graph, x=x), expected) <= EXACT
    found = []
    for draw in (random_admissible_map, random_wrong_map):
        mapped = graph.copy()
        region = region_of(mapped, "ffn")
        insert_and_fold(mapped, region, draw(region, torch.Generator().manual_seed(1)))
        found.append(difference(run(mapped, x=x), expected))
    assert found[0] <= EXACT
    assert found[1] >= 100 * EXACT
    assert difference(run(graph, x=x), expected) <= EXACT  # the copies were independent


@pytest.mark.parametrize("opset", [18, 23])
def test_stream_has_the_regions_of_its_fx_twin(stream: Any, run: Any, difference: Any, opset: int) -> None:
    module, graph = stream(opset)
    twin = fx_graph(module, IDS)
    for form in (graph, twin):
        DropNoOps()(form)
        assert len(RecogniseNorms()(form).records) == 2
    assert summary(graph) == summary(twin)
    assert [region["kind"] for region in summary(graph)] == ["residual", "ffn"]
    spelling = "RMSNormalization" if opset == 23 else "SimplifiedLayerNormalization"
    assert [op.spelling for op in graph.ops if op.kind is Kind.RMS_NORM] == [spelling] * 2
    assert difference(run(graph, ids=IDS), module(IDS).detach()) <= EXACT


# What the norm reads and puts out before the gain is float32, as in models stored in half precision.
HALF_GAIN = """<ir_version: 10, opset_import: ["" : 20]>
half (float[batch, length, 8] x) => (bfloat16[batch, length, 8] y)
<float two = {2.0}, float epsilon = {0.00001}, int64[1] last = {-1}> {
    q = Pow(x, two)
    m = ReduceMean <keepdims = 1> (q, last)
    e = Add(m, epsilon)
    r = Sqrt(e)
    i = Reciprocal(r)
    n = Mul(x, i)
    rounded = Cast <to = 16> (n)
    y = Mul("norm.weight", rounded)
}"""


def test_a_norm_of_float32_with_a_gain_in_bfloat16_is_of_one_type() -> None:
    """No kernel of ONNX Runtime takes the two."""
    proto = onnx.parser.parse_model(HALF_GAIN)
    gain = onnx.helper.make_tensor("norm.weight", onnx.TensorProto.BFLOAT16, [WIDTH], torch.linspace(0.5, 1.5, WIDTH))
    proto.graph.initializer.append(gain)
    graph = OnnxGraph(ir.from_proto(onnx.shape_inference.infer_shapes(proto)))
    assert RecogniseNorms()(graph).records
    (norm,) = [node for node in graph.model.graph if node.op_type == "SimplifiedLayerNormalization"]
    assert {value.dtype for value in (*norm.inputs, *norm.outputs)} == {ir.DataType.BFLOAT16}
    assert norm.inputs[0].producer().inputs[0].name == "x"


@pytest.mark.parametrize("opset", [18, 23])
def test_stream_lets_rotations_through_and_no_others(
    stream: Any, run: Any, difference: Any, insert_and_fold: Any, opset: int
) -> None:
    module, graph = stream(opset)
    expected = module(IDS).detach()
    RecogniseNorms()(graph)
    FoldNormGains(region_of(graph, "residual"))(graph)
    assert difference(run(graph, ids=IDS), expected) <= EXACT
    found = []
    for draw in (random_admissible_map, random_wrong_map):
        mapped = graph.copy()
        for kind in ("residual", "ffn"):
            region = region_of(mapped, kind)
            insert_and_fold(mapped, region, draw(region, torch.Generator().manual_seed(2)))
        found.append(difference(run(mapped, ids=IDS), expected))
        if draw is random_admissible_map:  # down is up transposed, so table and head are still one
            assert len(mapped.users(named(mapped, "x").weight)) == 2
    assert found[0] <= EXACT
    assert found[1] >= 100 * EXACT


@pytest.mark.parametrize(("opset", "kept"), [(18, 5), (23, 5), (23, 1)])
def test_selection_makes_initializers_and_shapes_smaller(
    stream: Any, run: Any, insert_and_fold: Any, assert_shapes_agree: Any, opset: int, kept: int
) -> None:
    _, graph = stream(opset)
    DropNoOps()(graph)
    RecogniseNorms()(graph)
    FoldNormGains(region_of(graph, "residual"))(graph)
    support = torch.tensor([7, 0, 3, 5, 10][:kept])
    for region in (region_of(graph, "ffn"), region_of(graph, "residual")):
        chosen = selection(support if region.kind == "ffn" else support[support < WIDTH], region.width)
        insert_and_fold(graph, region, RegionMap(chosen, chosen.T))
    slim, inner = int((support < WIDTH).sum()), kept
    sizes = {name: tuple(value.const_value.shape) for name, value in graph.model.graph.initializers.items()}
    assert sizes["gate.weight"] == (slim, inner)
    assert sizes["up.weight"] == (slim, inner)
    assert sizes["up.bias"] == (inner,)
    assert sizes["down.weight"] == (inner, slim)
    assert sizes["down.bias"] == (slim,)
    assert sizes["embed.weight"] == (VOCAB, slim)
    assert WIDTH not in {size for shape in sizes.values() for size in shape}
    widths = {v.name: v.shape[-1] for node in graph.model.graph for v in node.outputs if v.shape}
    assert {widths[name] for name in ("x", "d", "x2", "z1", "z2")} == {slim}
    assert {widths[name] for name in ("g", "s", "a", "u", "h")} == {inner}
    if opset == 23:  # the checker does not know ONNX Runtime's own norm
        assert_shapes_agree(graph)
        onnx.checker.check_model(ir.to_proto(graph.model), full_check=True)
    assert run(graph, ids=IDS).shape == (2, 5, VOCAB)


def test_selection_drops_only_what_it_does_not_select(
    run: Any, difference: Any, insert_and_fold: Any, assert_shapes_agree: Any, gated: tuple[nn.Module, OnnxGraph]
) -> None:
    """Where the dropped units' reader columns are zero, nothing may change at all."""
    module, graph = gated
    kept = torch.tensor([1, 2, 4, 6, 11])
    lost = [i for i in range(INNER) if i not in kept]
    weight = graph.weight(graph.op("y")).clone()
    weight[:, lost] = 0
    graph.set_weight(graph.op("y"), weight)
    x = torch.randn(2, 3, WIDTH)
    dense = run(graph, x=x)
    assert difference(dense, module(x).detach()) > EXACT
    chosen = selection(kept, INNER)
    insert_and_fold(graph, region_of(graph, "ffn"), RegionMap(chosen, chosen.T))
    assert difference(run(graph, x=x), dense) <= EXACT
    assert_shapes_agree(graph)
