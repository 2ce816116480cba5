"""What is emitted is really smaller, all of it, and computes what the slim program computes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dotresize_fx.cost import count_cost
from dotresize_fx.export.capture import capture
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.node_profile import profile_nodes
from dotresize_fx.export.onnx_file import ONNX_FILE, WEIGHTS_FILE, onnx_size
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.options import Options
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.progress import Progress

# Widths that nothing else in the model has: heads take 4 x 8, positions go to 64. The vocabulary makes the tied table
# larger than what the converter folds: a transposed copy of a smaller one would be stored beside it.
STREAM, FFN, VOCABULARY = 40, 72, 300


@dataclass(frozen=True)
class Emitted:
    """One model in two widths: programs and ONNX files."""

    dense: FxGraph
    slim: FxGraph
    dense_path: Path
    slim_path: Path
    widths: dict[str, set[int]]


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory, tiny_batch: Callable[..., Any]) -> Emitted:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=STREAM,
        intermediate_size=FFN,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, parameter.shape[-1] ** -0.5) if parameter.ndim == 2 else parameter.uniform_(0.5, 1.5)
    captured = capture(model)
    canonicalise(captured.graph)
    batches = [tiny_batch(2, 32, seed=seed) for seed in range(3)]
    options = Options(ratio=0.25, regions=("ffn", "residual"), multiple=4)
    done = slim_graph(captured.graph, find_regions(captured.graph), batches, options, Progress(quiet=True))
    slimmed = done.graph
    widths: dict[str, set[int]] = {}
    for cut in done.swept:
        widths.setdefault(cut.region.kind, set()).add(cut.width)
    slim_folder, dense_folder = (tmp_path_factory.mktemp(name) for name in ("slim", "dense"))
    slim_path = emit_onnx(model, captured, slimmed, slim_folder)
    dense_path = emit_onnx(model, captured, captured.graph, dense_folder)
    return Emitted(captured.graph, slimmed, dense_path, slim_path, widths)


def shapes(model: onnx.ModelProto) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every shape that the file states: weights, values between, inputs and outputs."""
    graph = model.graph
    yield from ((tensor.name, tuple(tensor.dims)) for tensor in graph.initializer)
    for value in (*graph.value_info, *graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        yield value.name, tuple(dim.dim_value for dim in dims if dim.HasField("dim_value"))


def small_constants(model: onnx.ModelProto) -> Iterator[tuple[str, list[int]]]:
    """Integers that shape arithmetic works with: targets of Reshape, ends of Slice."""
    graph = model.graph
    nodes = [a.t for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.TENSOR]
    for tensor in (*graph.initializer, *nodes):
        if tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32) and tensor.data_location == 0:
            yield tensor.name, onnx.numpy_helper.to_array(tensor).reshape(-1).tolist()
    for node in graph.node:
        for attribute in node.attribute:
            yield node.name, [attribute.i, *attribute.ints]


def stated(path: Path) -> set[int]:
    """Every dimension and every shape constant of the file."""
    model = onnx.load(path, load_external_data=False)
    found = {dim for _, shape in shapes(model) for dim in shape}
    return found | {number for _, numbers in small_constants(model) for number in numbers}


def test_no_dense_width_is_left(emitted: Emitted) -> None:
    """Neither in a weight nor in the shape of a value between two ops; the dense file states both."""
    assert emitted.widths["residual"] <= set(range(1, STREAM))
    assert emitted.widths["ffn"] <= set(range(1, FFN))
    assert {STREAM, FFN} <= stated(emitted.dense_path)
    assert {STREAM, FFN} & stated(emitted.slim_path) == set()
    for widths in emitted.widths.values():
        assert widths <= stated(emitted.slim_path)


def test_values_between_are_described(emitted: Emitted) -> None:
    """Else the test before proves little: most values between ops come with a shape."""
    model = onnx.load(emitted.slim_path, load_external_data=False)
    produced = [name for node in model.graph.node for name in node.output if name]
    assert len(model.graph.value_info) > 0.8 * len(produced)
    onnx.shape_inference.infer_shapes_path(str(emitted.slim_path), str(emitted.slim_path.parent / "inferred.onnx"))


def test_initialisers_hold_what_the_report_counts(emitted: Emitted) -> None:
    for path, graph in ((emitted.slim_path, emitted.slim), (emitted.dense_path, emitted.dense)):
        model = onnx.load(path)
        floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
        stored = sum(int(np.prod(tensor.dims)) for tensor in floats)
        # Scalars of the graph, such as epsilons, are no parameters.
        assert count_cost(graph, 1).parameters <= stored <= count_cost(graph, 1).parameters + 100
    assert count_cost(emitted.slim, 1).parameters < count_cost(emitted.dense, 1).parameters


def test_weights_lie_in_one_external_file(emitted: Emitted) -> None:
    assert sorted(file.name for file in emitted.dense_path.parent.iterdir()) == [ONNX_FILE, WEIGHTS_FILE]
    for path in (emitted.slim_path, emitted.dense_path):
        model = onnx.load(path, load_external_data=False)
        inside = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert all(np.prod(tensor.dims) <= 1024 for tensor in inside)
        outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert len(outside) >= 7  # every linear of the layer
        locations = {entry.value for t in outside for entry in t.external_data if entry.key == "location"}
        assert locations == {WEIGHTS_FILE}  # beside the model, by its name alone
        assert onnx_size(path) == path.stat().st_size + (path.parent / WEIGHTS_FILE).stat().st_size
    assert onnx_size(emitted.slim_path) < onnx_size(emitted.dense_path)


@pytest.mark.parametrize(("rows", "length", "padding"), [(1, 1, 0), (3, 29, 7), (2, 64, 0)])
def test_onnx_runtime_computes_what_the_program_does(
    emitted: Emitted, tiny_batch: Callable[..., Any], rows: int, length: int, padding: int
) -> None:
    batch = tiny_batch(rows, length, padding)
    real = batch["attention_mask"].bool().numpy()
    for path, graph in ((emitted.slim_path, emitted.slim), (emitted.dense_path, emitted.dense)):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (found,) = session.run(["logits"], {name: value.numpy() for name, value in batch.items()})
        expected = Execution(graph).outputs(batch)[0].numpy()
        # Two float32 implementations of one function; logits are of size 1.
        assert np.abs(found - expected)[real].max() <= 1e-4
    slim = Execution(emitted.slim).outputs(batch)[0].numpy()
    assert np.abs(found - slim)[real].max() > 1e-2  # the last of both was the dense one: another function


def test_macs_of_the_file_are_those_that_torch_counts(
    emitted: Emitted, tiny_batch: Callable[..., Any], tmp_path: Path
) -> None:
    batch = tiny_batch(3, 29, 7)
    inputs = {name: value.numpy() for name, value in batch.items()}
    counted = []
    for path, graph in ((emitted.dense_path, emitted.dense), (emitted.slim_path, emitted.slim)):
        how = {"threads": 1, "provider": "CPUExecutionProvider", "equations": {}, "work": tmp_path}
        nodes = profile_nodes(path, inputs, runs=1, optimised=False, **how).nodes
        # torch counts no attention on the CPU, unless it is made of its products.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            Execution(graph).outputs(batch)
        counted.append(sum(node.macs or 0 for node in nodes))
        assert counted[-1] == pytest.approx(counter.get_total_flops() / 2, rel=0.02)
        assert [node.name for node in nodes if node.macs is None] == []
    assert counted[1] < 0.9 * counted[0]


def test_nothing_is_said(emitted: Emitted, tiny_model: Any, tmp_path: Path, capfd: Any, caplog: Any) -> None:
    """The converter and transformers have much to say about versions and optimisations."""
    model = tiny_model("gpt2", layers=1)
    captured = capture(model)
    capfd.readouterr()
    caplog.clear()
    emit_onnx(model, captured, captured.graph, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO] == []
