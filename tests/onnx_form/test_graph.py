"""The ONNX form of the neutral view: the regions of its torch.fx twin, and edits that ONNX Runtime confirms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.passes.centre_layer_norms import CentreLayerNorms
from dotresize_fx.passes.drop_no_ops import DropNoOps
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.fold_linears import FoldLinears
from dotresize_fx.passes.fold_norm_gains import FoldNormGains
from dotresize_fx.passes.insert_maps import InsertMaps
from dotresize_fx.passes.recognise_norms import RecogniseNorms
from dotresize_fx.region_map import RegionMap, random_admissible_map, random_wrong_map, selection
from dotresize_fx.regions import Region

ort = pytest.importorskip("onnxruntime")

WIDTH, INNER, VOCAB = 8, 12, 20
EXACT = 1e-5  # of the largest output: float32 with a factor of ten to spare; the design's bound for ratio 0

Weights = dict[str, torch.Tensor]

GATED = """<ir_version: 10, opset_import: ["" : 20]>
gated (float[batch, length, 8] x) => (float[batch, length, 8] y) {
    g = MatMul(x, "gate.weight")
    s = Sigmoid(g)
    a = Mul(g, s)
    u0 = MatMul(x, "up.weight")
    u = Add(u0, "up.bias")
    h = Mul(a, u)
    y0 = MatMul(h, "down.weight")
    y = Add(y0, "down.bias")
}"""

# An embedding, a gated FFN behind a decomposed RMSNorm, a skip, a final norm, and the embedding again as the head.
STREAM = """<ir_version: 10, opset_import: ["" : OPSET]>
stream (int64[batch, length] ids) => (float[batch, length, 20] logits)
<float two = {2.0}, float epsilon = {0.00001}, int64[1] last = {-1}> {
    x = Gather("embed.weight", ids)
    q1 = Pow(x, two)
    m1 = ReduceMean <keepdims = 1> (q1, last)
    e1 = Add(m1, epsilon)
    r1 = Sqrt(e1)
    i1 = Reciprocal(r1)
    n1 = Mul(x, i1)
    z1 = Mul("norm.weight", n1)
    g = MatMul(z1, "gate.weight")
    s = Sigmoid(g)
    a = Mul(g, s)
    u0 = MatMul(z1, "up.weight")
    u = Add(u0, "up.bias")
    h = Mul(a, u)
    d0 = MatMul(h, "down.weight")
    d = Add(d0, "down.bias")
    x2 = Add(x, d)
    q2 = Pow(x2, two)
    m2 = ReduceMean <keepdims = 1> (q2, last)
    e2 = Add(m2, epsilon)
    r2 = Sqrt(e2)
    i2 = Reciprocal(r2)
    n2 = Mul(x2, i2)
    z2 = Mul("final.weight", n2)
    t = Transpose <perm = [1, 0]> ("embed.weight")
    logits = MatMul(z2, t)
}"""


class GatedFfn(nn.Module):
    """The torch twin of GATED."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, INNER, bias=False)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Stream(GatedFfn):
    """The torch twin of STREAM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.norm, self.final = RmsNorm(), RmsNorm()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + super().forward(self.norm(x))
        return nn.functional.linear(self.final(x), self.embed.weight)


def redrawn(module: nn.Module) -> nn.Module:
    """Gains between 0.5 and 1.5 and biases that are not zero: default initialisation hides a forgotten one."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        norm = name in ("norm.weight", "final.weight")
        nn.init.uniform_(parameter, 0.5, 1.5) if norm else nn.init.normal_(parameter, 0, 0.4)
    return module.eval()


def weights_of(module: nn.Module) -> Weights:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def onnx_graph(text: str, weights: Mapping[str, torch.Tensor], stored: tuple[str, ...] = ()) -> OnnxGraph:
    """The model with its weights as ONNX stores them: matrices as (in, out), those in ``stored`` as torch has them."""
    proto = onnx.parser.parse_model(text)
    for name, weight in weights.items():
        turned = weight.T if weight.ndim == 2 and name not in stored else weight
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(turned.numpy()), name))
    return OnnxGraph(ir.from_proto(proto))


def fx_graph(module: nn.Module, sample: torch.Tensor) -> FxGraph:
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=64)
    program = torch.export.export(module, (sample,), dynamic_shapes=({0: batch, 1: length},))
    return FxGraph(program)


def run(graph: OnnxGraph, **inputs: torch.Tensor) -> torch.Tensor:
    """The first output in ONNX Runtime, without its own graph optimisations, so that what is run is what was made."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(graph.model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


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


def insert_and_fold(graph: Graph, region: Region, region_map: RegionMap) -> None:
    insert = InsertMaps(region, region_map)
    insert(graph)
    FoldLinears(insert.downs, insert.ups)(graph)


def assert_shapes_agree(graph: OnnxGraph) -> None:
    """Every value's stated shape is what inference finds from inputs and initializers alone."""
    stated = {v.name: v.shape for node in graph.model.graph for v in node.outputs}
    bare = graph.model.clone()
    for node in bare.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(bare), strict_mode=True, data_prop=True)
    checked = 0
    for info in inferred.graph.value_info:
        if info.name in stated:
            sizes = [d.dim_value for d in info.type.tensor_type.shape.dim]
            for found, said in zip(sizes, stated[info.name] or (), strict=True):
                assert found in (0, said), info.name  # 0: inference does not know
            checked += sizes[-1:] != [0]
    assert checked > 0


@pytest.fixture
def gated() -> tuple[nn.Module, OnnxGraph]:
    module = redrawn(GatedFfn())
    return module, onnx_graph(GATED, weights_of(module))


def stream(opset: int = 23) -> tuple[nn.Module, OnnxGraph]:
    module = redrawn(Stream())
    text = STREAM.replace("OPSET", str(opset))
    return module, onnx_graph(text, weights_of(module), stored=("embed.weight",))


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


def test_gated_block_lets_admissible_maps_through_and_no_others(gated: tuple[nn.Module, OnnxGraph]) -> None:
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
def test_stream_has_the_regions_of_its_fx_twin(opset: int) -> None:
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


@pytest.mark.parametrize("opset", [18, 23])
def test_stream_lets_rotations_through_and_no_others(opset: int) -> None:
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
def test_selection_makes_initializers_and_shapes_smaller(opset: int, kept: int) -> None:
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


def test_selection_drops_only_what_it_does_not_select(gated: tuple[nn.Module, OnnxGraph]) -> None:
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


# -- what is refused -------------------------------------------------------------------------------

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
        g, u = Split <num_outputs = 2> (f)
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
    "a parameter is combined with it directly": """(float[batch, 8] x) => (float[batch, 8] y) {
        h0 = MatMul(x, "up.weight")
        h = Mul("scale", h0)
        y = MatMul(h, "down.weight")
    }""",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_width_that_is_not_understood_is_refused_with_the_reason(reason: str) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]>\nrefused ' + REFUSED[reason]
    weights = {"up.weight": torch.randn(INNER, WIDTH), "down.weight": torch.randn(WIDTH, INNER)}
    weights |= {"half.weight": torch.randn(WIDTH, INNER // 2), "scale": torch.rand(INNER)}
    report = find_regions(onnx_graph(text, {name: w for name, w in weights.items() if name in text}))
    assert not report.regions
    writer = next(match for match in report.linears if match.parameter == "up.weight")
    assert writer.writes_reason.startswith(reason)


def test_a_weight_read_in_both_orientations_is_no_linears_weight() -> None:
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


# -- spellings -------------------------------------------------------------------------------------

SPELLINGS = {
    "MatMul": 'y = MatMul(x, "w")',
    "MatMul of a Transpose": 't = Transpose("w")\n y = MatMul(x, t)',
    "Gemm": 'y = Gemm(x, "w")',
    "Gemm transB": 'y = Gemm <transB = 1> (x, "w")',
    "Gemm of a Transpose": 't = Transpose("w")\n y = Gemm(x, t)',
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_spellings_of_a_linear_are_one_op_to_read_and_to_edit(spelling: str, with_bias: bool) -> None:
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


def test_numbers_and_functions_are_read_as_in_torch() -> None:
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


# -- edits -----------------------------------------------------------------------------------------


def test_a_shared_initializer_is_forked_when_one_user_changes() -> None:
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
def test_layer_norms_lose_their_gain_and_become_rms_norms(opset: int) -> None:
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


def test_reshapes_that_keep_the_width_are_crossed_and_resized() -> None:
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


def test_graph_outputs_keep_their_names_when_ops_go() -> None:
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
def test_half_precision_weights_stay_in_their_dtype(dtype: torch.dtype) -> None:
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


def test_what_is_not_edited_stays_as_it_was() -> None:
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


def test_edits_of_heads_are_refused_in_words() -> None:
    graph = OnnxGraph.__new__(OnnxGraph)
    value = Value("x", (2, 4))
    op = Op("attention", Kind.ATTENTION, (value,), value)
    edits: list[Callable[[], object]] = [
        lambda: graph.resize_axes(op, {0: 1}),
        lambda: graph.resize_slice(op, 0, None),
        lambda: graph.insert_gather(value, torch.tensor([0]), users=[]),
        lambda: graph.set_attention_scale(op, 1.0),
        lambda: graph.redirect(op, value),
    ]
    for edit in edits:
        with pytest.raises(NotImplementedError, match="of an ONNX graph"):
            edit()
