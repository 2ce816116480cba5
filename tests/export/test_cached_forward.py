"""A forward pass with its cache, traced: each layer's shapes are told once, and the program is the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from dotresize_fx.export import cached_forward as module
from dotresize_fx.export.capture_cache import capture_with_cache

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def llama(layers: int) -> Any:
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, num_hidden_layers=layers, max_position_embeddings=64
    )
    return transformers.LlamaForCausalLM(config).eval()


def asked(layers: int) -> int:
    """How often torch had to find out what an op gives."""
    FakeTensorMode.cache_clear()
    capture_with_cache(llama(layers), compare=False)
    return FakeTensorMode.cache_info().misses


def test_shapes_are_told_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first few layers differ in what stands before them; of the others torch keeps all but a view or two."""
    assert asked(6) - asked(4) < 2 * 10
    monkeypatch.setattr(module, "_same_symbols", lambda inputs: nullcontext())
    assert asked(6) - asked(4) > 2 * 30


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_the_program_is_the_same(kind: str, tiny_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With its bounds, and what it asks of its inputs."""

    def told() -> list[str]:
        program = capture_with_cache(model, compare=False).graph.program
        shapes = {node.name: str(node.meta.get("val")) for node in program.graph.nodes}
        parts = (program.graph_module.code, program.graph_signature, program.range_constraints, program._guards_code)
        return [*map(str, parts), str(shapes)]

    model = tiny_model(kind)
    found = told()
    monkeypatch.setattr(module, "_same_symbols", lambda inputs: nullcontext())
    assert found == told()
