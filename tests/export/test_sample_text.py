"""Text from the model itself: its shape, its ids, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dotresize_fx.errors import UsageError
from dotresize_fx.export.model_source import LoadedModel, load_model
from dotresize_fx.export.sample_text import sample_tokens

SPECIAL = {0, 1, 2}
TEXT = 259  # ids from here on are in the model's vocabulary of 300 and not in the tokenizer


def sample(loaded: LoadedModel, **changed: Any) -> torch.Tensor:
    return sample_tokens(loaded, **{"sequences": 5, "length": 12, "seed": 0, "device": "cpu", "batch": 2} | changed)


@pytest.fixture
def loaded(save_tiny_model: Callable[..., Path], tmp_path: Path) -> LoadedModel:
    return load_model(str(save_tiny_model(tmp_path / "model")))


def test_ids_are_text_and_the_seed_decides(loaded: LoadedModel) -> None:
    found = sample(loaded)
    assert (found.shape, found.dtype, found.device.type) == ((5, 12), torch.int64, "cpu")
    assert not found.is_inference()
    assert torch.equal(found, sample(loaded))
    assert not torch.equal(found, sample(loaded, seed=1))
    assert torch.equal(found[:, 0], sample(loaded, length=1)[:, 0])
    many = sample(loaded, sequences=64, length=64, batch=64)
    ids = set(many.flatten().tolist())
    assert not ids & SPECIAL
    assert max(ids) < TEXT
    assert len(ids) > 200


def test_the_model_and_the_random_state_stay(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = loaded.model
    config, settings = model.config.to_dict(), model.generation_config.to_dict()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}

    def untouched() -> bool:
        now = model.state_dict(keep_vars=True)
        same = all(now[name] is tensor and torch.equal(tensor, value) for name, (tensor, value) in before.items())
        return same and (model.config.to_dict(), model.generation_config.to_dict()) == (config, settings)

    state = torch.get_rng_state()
    sample(loaded)
    assert untouched()
    assert torch.equal(torch.get_rng_state(), state)

    def interrupted(*_: Any, **__: Any) -> None:
        torch.rand(3)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample(loaded)
    assert untouched()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_models_own_settings_do_not_count(loaded: LoadedModel) -> None:
    expected = sample(loaded)
    model: Any = loaded.model
    every = list(range(3, TEXT))
    model.generation_config = transformers.GenerationConfig(
        repetition_penalty=5.0, eos_token_id=every, max_length=3, top_k=1, suppress_tokens=every[:50], use_cache=False
    )
    assert torch.equal(sample(loaded), expected)


def test_samples_follow_the_models_distribution(loaded: LoadedModel) -> None:
    """Second tokens after one first token, against what the model says of them."""
    model: Any = loaded.model
    model.lm_head.weight.mul_(20)
    found = sample(loaded, sequences=4000, length=2, batch=4000)
    first, count = found[:, 0].unique(return_counts=True)
    logits = model(input_ids=first[:, None]).logits[:, 0].float()
    logits[:, [*SPECIAL, *range(TEXT, 300)]] = -torch.inf
    expected = (logits.softmax(-1) * count[:, None]).sum(0) / len(found)
    measured = found[:, 1].bincount(minlength=300) / len(found)
    noise = (expected / len(found)).sqrt()
    assert float(((measured - expected).abs() / noise.clamp_min(1e-4)).max()) < 5


def test_without_a_tokenizer_the_configuration_says_what_is_special(loaded: LoadedModel) -> None:
    loaded.config.eos_token_id = [5, 6]
    found = sample(replace(loaded, tokenizer=None), sequences=64, length=32, batch=64)
    assert not set(found.flatten().tolist()) & {5, 6}
    assert int(found.max()) >= TEXT


def test_what_cannot_be_sampled_is_said(
    loaded: LoadedModel, save_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="BertModel cannot write text"):
        sample(load_model(str(save_tiny_model(tmp_path / "bert", "bert"))))
    with pytest.raises(UsageError, match="takes 64 at most"):
        sample(loaded, length=65)
    with pytest.raises(UsageError, match="sequences is 0"):
        sample(loaded, sequences=0)
