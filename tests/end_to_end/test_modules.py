"""Modules that are no transformers models by path: traced by example inputs, slimmed, and run in ONNX Runtime.

What is asked of each: it is what the module computes (capture compares that), something of it is cut, the ONNX has the
module's own names, and computes what the slim program does for a batch that was not traced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from dotresize_fx.compiler import slim
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.onnx_session import OnnxModel
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.passes.prove_exactness import BOUND, BROKEN, map_regions, redraw_parameters
from dotresize_fx.region_map import random_admissible_map, random_wrong_map
from dotresize_fx.slim_result import SlimResult

Sample = dict[str, torch.Tensor]
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64}
# Two float32 runtimes, outputs of about 1: rounding in a layer or two.
ROUNDING = 1e-4


class Embedder(nn.Module):
    """A sentence encoder: BERT, the mean over real tokens, unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = transformers.BertModel(transformers.BertConfig(**SIZES))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return {"sentence_embedding": nn.functional.normalize(pooled, dim=1)}


def transformer_encoder(*, norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=not norm_first)


def t5() -> nn.Module:
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def whisper_encoder() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_attention_heads=4, decoder_ffn_dim=64, num_mel_bins=16, max_source_positions=20, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperModel(config).get_encoder()


def vit() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes)


def ids(rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=generator)


def mask(rows: int, length: int) -> torch.Tensor:
    return (torch.arange(length) < torch.tensor([length, length - 3] * rows)[:rows, None]).long()


Draw = Callable[[int, int, torch.Generator], Sample]
FFN, HEADS = "ffn", ("ffn", "value", "query_key")
# How to make it, its inputs for (rows, length), the kinds of region that are found, and its outputs' names.
ZOO: dict[str, tuple[Callable[[], nn.Module], Draw, tuple[str, ...], tuple[str, ...]]] = {
    "TransformerEncoder": (
        lambda: transformer_encoder(norm_first=False),
        lambda b, n, g: {"src": torch.randn(b, n, 32, generator=g), "src_key_padding_mask": mask(b, n) == 0},
        (FFN,),
        ("output",),
    ),
    "TransformerEncoder, pre-norm": (
        lambda: transformer_encoder(norm_first=True),
        lambda b, n, g: {"src": torch.randn(b, n, 32, generator=g)},
        (FFN,),
        ("output",),
    ),
    "sentence encoder": (
        Embedder,
        lambda b, n, g: {"input_ids": ids(b, n, g), "attention_mask": mask(b, n)},
        HEADS,
        ("sentence_embedding",),
    ),
    "T5": (
        t5,
        lambda b, n, g: {"input_ids": ids(b, n, g), "decoder_input_ids": ids(b, n - 2, g)},
        HEADS,
        ("logits", "encoder_last_hidden_state"),
    ),
    "Whisper's encoder": (
        whisper_encoder,
        lambda b, n, g: {"input_features": torch.randn(b, 16, 40, generator=g)},
        HEADS,
        ("last_hidden_state",),
    ),
    "ViT": (vit, lambda b, n, g: {"pixel_values": torch.randn(b, 3, 16, 16, generator=g)}, HEADS, ("logits",)),
    "timm ViT": (timm_vit, lambda b, n, g: {"x": torch.randn(b, 3, 16, 16, generator=g)}, (FFN,), ("output",)),
}


def slimmed(name: str, ratio: float) -> tuple[nn.Module, Draw, SlimResult]:
    make, draw, _, _ = ZOO[name]
    module = redraw_parameters(make()).train()  # as a user has it after training
    generator = torch.Generator().manual_seed(1)
    calibration = [draw(2, 8 + i % 3, generator) for i in range(12)]
    return module, draw, slim(module, ratio, example_inputs=draw(4, 10, generator), calibration=calibration)


@pytest.fixture(scope="module")
def cut() -> Callable[[str], tuple[nn.Module, Draw, SlimResult]]:
    """``cut(name)``: the module, its inputs and the module slimmed by 20 %, once a run."""
    done: dict[str, tuple[nn.Module, Draw, SlimResult]] = {}

    def get(name: str) -> tuple[nn.Module, Draw, SlimResult]:
        if name not in done:
            done[name] = slimmed(name, 0.2)
        return done[name]

    return get


@pytest.mark.parametrize("name", ZOO)
def test_it_is_slimmed_and_its_onnx_runs(cut: Any, tmp_path: Path, name: str) -> None:
    module, draw, result = cut(name)
    assert module.training
    narrower = [entry for entry in result.swept if entry.width < entry.region.width]
    assert narrower
    inputs = draw(3, 7, torch.Generator().manual_seed(2))
    onnx = OnnxModel(emit_onnx(result.loaded.model, result.captured, result.slim, tmp_path))
    assert list(onnx.input_names) == list(inputs)
    assert tuple(onnx.output_names) == ZOO[name][3]
    expected = Execution(result.slim).outputs(inputs)
    found = onnx({key: value.numpy() for key, value in inputs.items()})
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", ZOO)
def test_what_is_matched_is_proved(cut: Any, difference: Any, name: str) -> None:
    """Random maps of full width change nothing, wrong ones do; see tests/architectures/test_exactness.py."""
    _, draw, result = cut(name)
    inputs = draw(3, 7, torch.Generator().manual_seed(3))
    expected = Execution(result.dense).outputs(inputs)
    kinds = ZOO[name][2]
    right, wrong = result.dense.copy(), result.dense.copy()
    assert map_regions(right, kinds, random_admissible_map) >= len(kinds)
    assert difference(Execution(right).outputs(inputs), expected) <= BOUND
    map_regions(wrong, (FFN,), random_wrong_map)
    assert difference(Execution(wrong).outputs(inputs), expected) >= BROKEN


@pytest.mark.parametrize("name", ["TransformerEncoder", "sentence encoder"])
def test_the_dense_program_is_the_module(cut: Any, difference: Any, name: str) -> None:
    module, draw, result = cut(name)
    inputs = draw(3, 7, torch.Generator().manual_seed(4))
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # it leaves zeros where padding is
    try:
        with torch.no_grad():
            found: Any = module(**inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
        module.train()
    values: Mapping[str, torch.Tensor] = found if isinstance(found, dict) else {"": found}
    assert difference(Execution(result.dense).outputs(inputs), list(values.values())) <= BOUND


def test_an_encoder_decoder_predicts_the_decoders_tokens(cut: Any) -> None:
    _, _, result = cut("T5")
    assert result.task == "logits"
    assert result.captured.predicts == "decoder_input_ids"
    assert cut("sentence encoder")[2].task == "outputs"
