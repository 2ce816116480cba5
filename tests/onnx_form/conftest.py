"""Graphs in ONNX form from text, their torch twins, and ONNX Runtime to run them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from dotresize_fx.graph import Graph
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.passes.fold_linears import FoldLinears
from dotresize_fx.passes.insert_maps import InsertMaps
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region

WIDTH, INNER, VOCAB = 8, 12, 20
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


def _onnx_graph(text: str, weights: Mapping[str, torch.Tensor], stored: tuple[str, ...] = ()) -> OnnxGraph:
    """The model with its weights as ONNX stores them: matrices as (in, out), those in ``stored`` as torch has them."""
    proto = onnx.parser.parse_model(text)
    for name, weight in weights.items():
        turned = weight.T if weight.ndim == 2 and name not in stored else weight
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(turned.numpy()), name))
    return OnnxGraph(ir.from_proto(proto))


@pytest.fixture(scope="session")
def onnx_graph() -> Callable[..., OnnxGraph]:
    """``onnx_graph(text, weights, stored=())``: the model with its weights as ONNX stores them, (in, out).

    Matrices in ``stored`` are stored as torch has them.
    """
    return _onnx_graph


def _run(graph: OnnxGraph, **inputs: torch.Tensor) -> torch.Tensor:
    """The first output in ONNX Runtime, without its own graph optimisations, so that what is run is what was made."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(graph.model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])


@pytest.fixture(scope="session")
def run() -> Callable[..., torch.Tensor]:
    """``run(graph, **inputs)``: the first output in ONNX Runtime."""
    return _run


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="session")
def difference() -> Callable[..., float]:
    """``difference(found, expected)`` of two tensors, relative to the largest expected number."""
    return _difference


def _insert_and_fold(graph: Graph, region: Region, region_map: RegionMap) -> None:
    insert = InsertMaps(region, region_map)
    insert(graph)
    FoldLinears(insert.downs, insert.ups)(graph)


@pytest.fixture(scope="session")
def insert_and_fold() -> Callable[..., None]:
    """``insert_and_fold(graph, region, region_map)``."""
    return _insert_and_fold


def _assert_shapes_agree(graph: OnnxGraph) -> None:
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


@pytest.fixture(scope="session")
def assert_shapes_agree() -> Callable[[OnnxGraph], None]:
    """``assert_shapes_agree(graph)``: what it states is what inference finds."""
    return _assert_shapes_agree


@pytest.fixture
def gated() -> tuple[nn.Module, OnnxGraph]:
    module = redrawn(GatedFfn())
    return module, _onnx_graph(GATED, weights_of(module))


def _stream(opset: int = 23) -> tuple[nn.Module, OnnxGraph]:
    module = redrawn(Stream())
    text = STREAM.replace("OPSET", str(opset))
    return module, _onnx_graph(text, weights_of(module), stored=("embed.weight",))


@pytest.fixture(scope="session")
def stream() -> Callable[..., tuple[nn.Module, OnnxGraph]]:
    """``stream(opset=23)``: (torch module, graph) of STREAM."""
    return _stream


def _feeds(session: Any, seed: int = 0, rows: int = 3, length: int = 7) -> dict[str, Any]:
    """Random inputs for what a session takes: ids with padding on the left, an empty past, pixels."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Any] = {}
    for item in session.get_inputs():
        dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}[item.type]
        if item.name.startswith("past"):
            size = item.shape[3] if isinstance(item.shape[3], int) else 16  # GenAI's builder names it
            feeds[item.name] = np.zeros((rows, item.shape[1], 0, size), dtype)
        elif item.name == "attention_mask":
            feeds[item.name] = np.ones((rows, length), dtype)
            feeds[item.name][0, :3] = 0
        elif item.name == "position_ids":
            feeds[item.name] = np.tile(np.arange(length), (rows, 1)).astype(dtype)
        elif dtype is np.int64:
            feeds[item.name] = rng.integers(0, 97, (rows, length))
        else:
            feeds[item.name] = rng.standard_normal([n if isinstance(n, int) else rows for n in item.shape]).astype(
                dtype
            )
    return feeds


def _first_output(model: ir.Model, seed: int = 0, **given: torch.Tensor) -> torch.Tensor:
    """The first output on random inputs, in ONNX Runtime without its own optimisations, as float64."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(ir.external_data.load_to_model(model)).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    feeds = _feeds(session, seed) | {name: tensor.numpy() for name, tensor in given.items()}
    return torch.from_numpy(session.run(None, feeds)[0].astype(np.float64))


@pytest.fixture(scope="session")
def first_output() -> Callable[..., torch.Tensor]:
    """``first_output(model, seed=0, **given)``: in ONNX Runtime, on random inputs but for those given."""
    return _first_output
