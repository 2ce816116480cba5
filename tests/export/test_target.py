"""Fused ops of ONNX Runtime over uneven widths: the same outputs at all optimisation levels, behind a past too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from dotresize_fx.export.cached_runs import continued, onnx_inputs, prompt_inputs
from dotresize_fx.export.capture import Captured
from dotresize_fx.export.capture_cache import capture_with_cache
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.fused_ops import count_fused_ops, fused_ops
from dotresize_fx.export.node_profile import profile_nodes
from dotresize_fx.export.node_regions import layer, node_modules, original_name, role
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.options import Options
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.progress import Progress

# A width that nothing else has, and what a stale shape would show: packed gate and up have twice as much.
FFN = 72
Slim = tuple[Any, Captured, FxGraph]


@pytest.fixture(scope="module")
def slim(tiny_batch: Callable[..., Any]) -> Slim:
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    model.model.layers[0].mlp.down_proj.weight *= 5  # so that the layers' widths come out unlike
    captured = capture_with_cache(model)
    canonicalise(captured.graph)
    batches = [tiny_batch(2, 32, seed=seed) for seed in range(3)]
    options = Options(ratio=0.25, regions=("ffn", "value"), multiple=4)
    done = slim_graph(captured.graph, find_regions(captured.graph), batches, options, Progress(quiet=True))
    widths = [cut.width for cut in done.swept if cut.region.kind.value == "ffn"]
    assert len(set(widths)) == 2
    assert FFN not in widths
    return model, captured, done.graph


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_fused_graph_computes_the_same_at_all_levels(slim: Slim, target: str, tmp_path: Path) -> None:
    model, captured, graph = slim
    path = emit_onnx(model, captured, graph, tmp_path, target)
    fused = fused_ops(path)
    assert fused["SkipSimplifiedLayerNormalization"] == 4  # of five norms; the first has no sum before it
    assert "4 SkipSimplifiedLayerNormalization" in count_fused_ops(path, target)
    ops = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    assert (ops["Attention"], ops["RotaryEmbedding"]) == (2, 4)
    assert not {"Softmax", "Transpose", "Pow"} & set(ops)
    assert ops["Concat"] <= 1  # a shape's; no cache's

    ids, mask = captured.sample["input_ids"], captured.sample["attention_mask"]
    whole = prompt_inputs(captured.cache, ids, mask)
    expected = Execution(graph, caches=True).outputs(whole)
    levels = onnxruntime.GraphOptimizationLevel
    for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_BASIC, levels.ORT_ENABLE_EXTENDED, levels.ORT_ENABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(path, options)
        for past in (0, 9, 15):  # several tokens behind a past, in a batch of several, are among it
            before = [output[:, :, :past] for output in expected[1:]]
            given = continued(graph, whole, before, past) if past else whole
            found = session.run(None, onnx_inputs(graph, given))[0]
            real = mask[:, past:].bool().numpy()
            # Float32, the sums in another order.
            np.testing.assert_allclose(found[real], expected[0][:, past:].numpy()[real], rtol=0, atol=1e-5)


def test_no_shape_in_the_file_has_a_dense_width(slim: Slim, tmp_path: Path) -> None:
    model, captured, graph = slim
    path = emit_onnx(model, captured, graph, tmp_path, "cpu")
    proto = onnx.load(path).graph
    shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in proto.value_info]
    stated = [*shapes, *(list(tensor.dims) for tensor in proto.initializer)]
    assert not [shape for shape in stated if {FFN, 2 * FFN} & set(shape)]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_every_fused_node_is_of_a_layer(slim: Slim, target: str, tmp_path: Path) -> None:
    """Also as ONNX Runtime runs it, with its own fusions: little of the time is elsewhere."""
    model, captured, graph = slim
    path = emit_onnx(model, captured, graph, tmp_path, target)
    proto = onnx.load(path, load_external_data=False).graph
    modules = node_modules(proto)
    fused = [node for node in proto.node if node.domain or node.op_type == "MatMul"]
    layers = Counter(layer(modules[node.name]) for node in fused if modules[node.name] != "lm_head")
    assert set(layers) == {"model.layers.0", "model.layers.1"}
    assert layers["model.layers.0"] == pytest.approx(layers["model.layers.1"], abs=1)  # the first norm has no skip
    packed = [node for node in fused if any(name.startswith("packed_matmul") for name in node.input)]
    assert {role(modules[node.name]) for node in packed} == {"model.layers.*.self_attn", "model.layers.*.mlp"}

    inputs = onnx_inputs(
        graph, prompt_inputs(captured.cache, *(captured.sample[n] for n in ("input_ids", "attention_mask")))
    )
    how = {"threads": 1, "provider": "CPUExecutionProvider", "equations": {}, "work": tmp_path}
    nodes = profile_nodes(path, inputs, runs=1, optimised=True, **how).nodes
    known = [original_name(node.name, modules) for node in nodes]
    multiplying = [name for name, node in zip(known, nodes, strict=True) if node.macs]
    assert [name for name in multiplying if name not in modules] == []
