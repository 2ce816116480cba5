"""Models whose query, key and value, or gate and up, are packed in one weight: cut by 20 %, emitted and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from dotresize_fx.cost import count_cost
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.options import Options
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.prove_exactness import BOUND
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.progress import Progress

HEADS = ("value", "query_key", "kv_heads")
UNPACKED = {
    "phi3": {"self_attn.qkv_proj.0", "self_attn.qkv_proj.1", "self_attn.qkv_proj.2", "mlp.gate_up_proj.0"},
    "gpt2": {"attn.c_attn.0", "attn.c_attn.1", "attn.c_attn.2"},
    "neox": {"attention.query_key_value.0", "attention.query_key_value.1", "attention.query_key_value.2"},
}

PARTLY = {"only a part of the head is rotated (partial rotary embedding), which is not supported yet"}


@pytest.mark.parametrize("kind", UNPACKED)
def test_what_is_seen_apart(tiny_graph: Any, kind: str) -> None:
    """Phi-3 slices and chunks, GPT-2 splits; GPT-NeoX goes head by head, and rotates a part of one alone."""
    report = find_regions(tiny_graph(kind)[1])
    apart = {row.parameter.removesuffix(".weight").split(".0.", 1)[-1] for row in report.linears if row.matched}
    assert apart >= UNPACKED[kind]
    assert len(list(report.of_kind(*HEADS))) == (4 if kind == "neox" else 6)
    assert {reason for _, reason in report.refused} == (PARTLY if kind == "neox" else set())


@pytest.mark.parametrize("kind", UNPACKED)
def test_a_fifth_goes_and_onnx_runtime_runs_the_rest(
    tiny_captured: Any, tiny_graph: Any, tiny_batch: Any, tmp_path: Path, kind: str
) -> None:
    model, captured = tiny_captured(kind)
    _, dense = tiny_graph(kind)
    batches = [tiny_batch(4, 16, 3, seed=seed) for seed in range(4)]
    slim = slim_graph(dense, find_regions(dense), batches, Options(ratio=0.2, multiple=2), Progress(quiet=True)).graph
    left = count_cost(slim, 1).block_linear_weights / count_cost(dense, 1).block_linear_weights
    assert left == pytest.approx(0.8, abs=0.03)  # a step of the widest region is a few percent of so small a model
    path = emit_onnx(model, captured, slim, tmp_path)
    batch = tiny_batch(3, 29, 7)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {name: value.numpy() for name, value in batch.items()})
    expected = Execution(slim).outputs(batch)[0].numpy()
    real = batch["attention_mask"].bool().numpy()
    assert np.abs(found - expected)[real].max() / np.abs(expected).max() <= BOUND
