"""Weights past the 2 GB that one protobuf file holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from dotresize_fx.export.cached_runs import onnx_inputs, prompt_inputs
from dotresize_fx.export.capture_cache import capture_with_cache
from dotresize_fx.export.convert_dtype import convert_dtype
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.onnx_file import WEIGHTS_FILE
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.passes.canonicalise import canonicalise

GIGABYTE = 1 << 30


@pytest.mark.slow
@pytest.mark.parametrize("target", ["any", "cpu"])
def test_a_file_of_more_than_2_gb_is_written_and_run(target: str, tmp_path: Path) -> None:
    """About a minute, 9 GB of memory and 4 GB of disk."""
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=1024,
        intermediate_size=96 * 1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # cheap numbers: a row of random ones, repeated and scaled
        row = torch.randn(parameter.shape[-1], generator=generator)
        parameter.copy_(row.expand(parameter.shape) * 0.02 if parameter.ndim > 1 else 1 + 0.1 * row)
    model.model.rotary_emb.__init__(config)  # type: ignore[misc]
    captured = capture_with_cache(model)
    canonicalise(captured.graph)
    path = emit_onnx(model, captured, captured.graph, tmp_path, target)
    assert (tmp_path / WEIGHTS_FILE).stat().st_size > 2 * GIGABYTE
    assert path.stat().st_size < GIGABYTE / 100
    inputs = prompt_inputs(captured.cache, captured.sample["input_ids"], captured.sample["attention_mask"])
    expected = Execution(captured.graph, caches=True).outputs(inputs)[0].numpy()
    real = inputs["attention_mask"].bool().numpy()
    (half := tmp_path / "half").mkdir()
    for file, allowed in ((path, 1e-4), (convert_dtype(path, half, "float16"), 2e-2)):
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        feed = onnx_inputs(captured.graph, inputs)
        wanted = {value.name: np.float16 for value in session.get_inputs() if "float16" in value.type}
        found = session.run(None, {name: value.astype(wanted.get(name, value.dtype)) for name, value in feed.items()})
        gap = np.abs(found[0].astype(np.float32) - expected)[real].max() / np.abs(expected[real]).max()
        assert gap < allowed  # sums of 98,304 terms, in another order
        del session, found
