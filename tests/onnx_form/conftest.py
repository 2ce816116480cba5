"""Graphs in ONNX form from text, their torch twins, and ONNX Runtime to run them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from torch import nn

from dotresize_fx.export.capture import capture
from dotresize_fx.export.capture_cache import capture_with_cache
from dotresize_fx.export.convert_dtype import convert_dtype
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.graph import Graph
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.passes.fold_linears import FoldLinears
from dotresize_fx.passes.insert_maps import InsertMaps
from dotresize_fx.passes.prove_exactness import redraw_parameters
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


# -- tiny models as each exporter writes them ------------------------------------------------------


class _Ids(nn.Module):
    """The first output alone, for exporters that take no dictionaries."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return output


class _Pixels(_Ids):
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        output: torch.Tensor = self.model(pixel_values=pixel_values)[0]
        return output


def _tiny(kind: str, make: Callable[..., Any], layers: int) -> Any:
    """A tiny model of any of the kinds below, its parameters re-drawn."""
    plain = {"vocab_size": 97, "max_position_embeddings": 64}
    if kind == "vit":
        sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 64}
        config: Any = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=7)
        model: Any = transformers.ViTForImageClassification(config)
    elif kind == "t5":
        sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": layers, "num_heads": 4}
        model = transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu"))
    elif kind == "distilbert":
        config = transformers.DistilBertConfig(**plain, dim=32, hidden_dim=64, n_layers=layers, n_heads=4)
        model = transformers.DistilBertModel(config)
    elif kind == "roberta":
        sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 64}
        model = transformers.RobertaModel(transformers.RobertaConfig(**plain, **sizes))
    else:
        return make(kind, layers=layers)
    return redraw_parameters(model.eval())


def _by_torch(model: Any, kind: str, path: Path, dynamo: bool) -> None:
    ids, mask = torch.randint(0, 97, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    image = kind == "vit"
    arguments: Any = (torch.randn(2, 3, 16, 16),) if image else (ids, mask)
    names = ["pixel_values"] if image else ["input_ids", "attention_mask"]
    free = {0: "batch"} if image else {0: "batch", 1: "length"}
    module = (_Pixels if image else _Ids)(model)
    if dynamo:
        shapes = tuple(dict.fromkeys(free, torch.export.Dim.DYNAMIC) for _ in arguments)
        program: Any = torch.onnx.export(
            module, arguments, dynamo=True, input_names=names, dynamic_shapes=shapes, verbose=False
        )
        program.save(str(path))
        return
    free_axes = dict.fromkeys([*names, "out"], free)
    options: Any = {"input_names": names, "output_names": ["out"], "dynamic_axes": free_axes, "opset_version": 17}
    torch.onnx.export(module, arguments, str(path), dynamo=False, **options)


def _by_us(model: Any, kind: str, path: Path, target: str) -> None:
    captured = capture_with_cache(model) if kind != "bert" else capture(model)
    emit_onnx(model, captured, captured.graph.copy(), path.parent, target)


def _optimised(source: Path, kind: str, path: Path, half: bool) -> None:
    pytest.importorskip("onnxruntime")
    from onnxruntime.transformers import optimizer

    name = "bert" if "bert" in kind else "gpt2"
    model = optimizer.optimize_model(str(source), model_type=name, num_heads=4, hidden_size=32, opt_level=0)
    if half:
        model.convert_float_to_float16(keep_io_types=True)
    model.save_model_to_file(str(path))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any]) -> Callable[..., Path]:
    """``exported(kind, way, layers=1)``: a tiny model as an ONNX file.

    ``way`` is ``script`` (TorchScript), ``dynamo``, ``any`` or ``cpu`` (our own exporter with a cache, by target),
    ``ort`` and ``ort-half`` (onnxruntime's optimiser on what TorchScript gave) or ``half`` (``cpu`` in float16).
    """

    @cache
    def make(kind: str, way: str, layers: int = 1) -> Path:
        path = tmp_path_factory.mktemp(f"{kind}-{way}") / "model.onnx"
        if way.startswith("ort"):
            _optimised(make(kind, "script", layers), kind, path, half=way == "ort-half")
        elif way == "half":
            convert_dtype(make(kind, "cpu", layers), path.parent, "float16")
        else:
            model = _tiny(kind, tiny_model, layers)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if way in ("any", "cpu"):
                    _by_us(model, kind, path, way)
                else:
                    _by_torch(model, kind, path, dynamo=way == "dynamo")
        return path

    return make


def _feeds(session: Any, seed: int = 0, rows: int = 3, length: int = 7) -> dict[str, Any]:
    """Random inputs for what a session takes: ids with padding on the left, an empty past, pixels."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Any] = {}
    for item in session.get_inputs():
        dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}[item.type]
        if item.name.startswith("past"):
            feeds[item.name] = np.zeros((rows, item.shape[1], 0, item.shape[3]), dtype)
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
