"""Capture: one program for any batch, length and padding; and what torch.export says where it refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers

from dotresize_fx.errors import CaptureError
from dotresize_fx.export.analyse import analyse
from dotresize_fx.export.capture import TRACED_BATCH, TRACED_LENGTH, TRACED_PADDING, UNLIMITED, capture
from dotresize_fx.export.model_source import LoadedModel
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.progress import Progress

Batch = Callable[..., Mapping[str, torch.Tensor]]
KINDS = ["llama", "gpt2", "bert"]

# float32 rounding over two layers, relative to the largest output.
CLOSE = 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "length", "padding"), [(1, 1, 0), (1, 64, 0), (3, 29, 0), (5, 7, 6), (2, 16, 5)])
def test_the_program_is_the_model(
    tiny_captured: Any, tiny_batch: Batch, kind: str, rows: int, length: int, padding: int
) -> None:
    """On shapes that were not traced (but the last), and where a row is padded, at its real positions."""
    model, program = tiny_captured(kind)
    batch = tiny_batch(rows, length, padding)
    found = Execution(program.graph).outputs(batch)[0]
    with torch.no_grad():
        expected = model(**batch)[0]
    real = batch["attention_mask"].bool()
    assert found.shape == expected.shape
    assert float((found - expected)[real].abs().max()) <= CLOSE * float(expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_is_an_input_and_works(tiny_captured: Any, tiny_batch: Batch, kind: str) -> None:
    _, program = tiny_captured(kind)
    batch = tiny_batch(2, 12, 4)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, :4] = (other["input_ids"][0, :4] + 1) % 97
    execution = Execution(program.graph)
    first, second = (execution.outputs(part)[0][batch["attention_mask"].bool()] for part in (batch, other))
    torch.testing.assert_close(first, second, rtol=0, atol=CLOSE)
    unmasked = execution.outputs({**other, "attention_mask": torch.ones_like(batch["attention_mask"])})[0]
    assert not torch.allclose(unmasked[0, 4:], execution.outputs(other)[0][0, 4:], atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_told_of_the_model(tiny_captured: Any, kind: str) -> None:
    _, program = tiny_captured(kind)
    assert (program.longest, program.vocabulary) == (64, 97)
    ids, mask = program.sample["input_ids"], program.sample["attention_mask"]
    assert ids.shape == mask.shape == (TRACED_BATCH, TRACED_LENGTH)
    assert mask.sum(1).tolist() == [TRACED_LENGTH - TRACED_PADDING, TRACED_LENGTH]
    assert ids.max() < 97


def test_the_model_is_left_as_it_was(tiny_model: Any, tiny_batch: Batch) -> None:
    model = tiny_model("gpt2", layers=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = tiny_batch(2, 9, 2)
    with torch.no_grad():
        expected = model(**batch)[0]
        capture(model)
        assert torch.equal(model(**batch)[0], expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Branching(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Goes one way or the other by what the tokens are."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        if input_ids.sum() > 100:
            input_ids = input_ids + 1
        return super().forward(input_ids, attention_mask, **kwargs)


def test_a_refusal_quotes_torch() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=97, max_position_embeddings=64, use_cache=False)
    said = r"Could not guard on data-dependent expression .*, at test_capture\.py line \d+ \("
    with pytest.raises(CaptureError, match=f"^torch.export cannot capture Branching: {said}") as caught:
        capture(Branching(config).eval())
    message = str(caught.value)
    assert "\n" not in message
    assert "TORCH_LOGS" not in message
    assert len(message) < 900
    assert caught.value.__cause__ is not None


def test_a_program_for_one_length_comes_with_what_torch_said(tiny_captured: Any) -> None:
    """Funnel computes with the length as a number; the compiler compares such a program on another length."""
    sizes = {"block_sizes": [1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64}
    doubt = capture(transformers.FunnelModel(transformers.FunnelConfig(vocab_size=97, **sizes)).eval()).doubt
    assert doubt.startswith("Constraints violated (length)! ")
    assert doubt.endswith("specialized it to be a constant (16)")
    assert [tiny_captured(kind)[1].doubt for kind in KINDS] == ["", "", ""]


def test_a_state_space_model_is_refused_in_one_line() -> None:
    """Mamba's scan runs over the length as a number: its program would fail at another length."""
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 2}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=97, use_cache=False, **sizes)).eval()
    program = capture(model)
    assert program.fixed == {"length": 16}
    loaded = LoadedModel(model, None, None, model.config, "decoder", "mamba", {})
    with pytest.raises(CaptureError, match="holds for a length of 16 alone") as caught:
        analyse(loaded, Progress(quiet=True))
    assert "\n" not in str(caught.value)


def test_a_model_without_a_longest_sequence_is_captured() -> None:
    """XLNet says that its longest sequence is -1."""
    sizes = {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 64}
    program = capture(transformers.XLNetModel(transformers.XLNetConfig(vocab_size=97, **sizes)).eval())
    assert program.longest == UNLIMITED
