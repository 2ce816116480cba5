"""config.json beside an ONNX of fewer layers: what transformers reads of it agrees with the graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from dotresize_fx.export.shallow_config import CONFIG_FILE, follow_depth, shallow_config

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4}
TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig(**SIZES, num_hidden_layers=4), {"num_hidden_layers": 3}),
    "gpt2": (transformers.GPT2Config(n_embd=32, n_layer=4, n_head=4), {"n_layer": 3}),
    # Which no stock checkpoint could hold: its layers compute with their numbers.
    "gpt2 by number": (transformers.GPT2Config(n_layer=4, scale_attn_by_inverse_layer_idx=True), {"n_layer": 3}),
    "lists": (
        transformers.Gemma3TextConfig(**SIZES, num_hidden_layers=4, layer_types=TYPES),
        {"num_hidden_layers": 3, "layer_types": [TYPES[0], *TYPES[2:]]},
    ),
    "gpt neo": (
        transformers.GPTNeoConfig(hidden_size=32, num_layers=4, attention_types=[[["global", "local"], 2]]),
        {
            "num_layers": 3,
            "attention_layers": ["global", "global", "local"],
            "attention_types": [[["global"], 1], [["global"], 1], [["local"], 1]],
        },
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_close_up(tmp_path: Path, kind: str) -> None:
    config, expected = CONFIGS[kind]
    found, why = shallow_config(config, 4, [1])
    assert why == ""
    config.save_pretrained(tmp_path)
    file = tmp_path / CONFIG_FILE
    before = json.loads(file.read_text(encoding="utf-8"))
    assert follow_depth(file, 4, [1]) == ""
    after = json.loads(file.read_text(encoding="utf-8"))
    assert after == before | {name: value for name, value in expected.items() if name in before}
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    for one in (found, read):
        assert {name: getattr(one, name) for name in expected} == expected
    assert config.num_hidden_layers == 4


def test_where_it_does_not_say_so_many_layers_it_stays(tmp_path: Path) -> None:
    config = CONFIGS["llama"][0]
    found, why = shallow_config(config, 8, [1])
    assert found is config
    assert why == "config.json is the dense model's, with its layers: LlamaConfig has no field that says 8 layers"
    config.save_pretrained(tmp_path)
    before = (file := tmp_path / CONFIG_FILE).read_bytes()
    assert "it has no num_hidden_layers of 8" in follow_depth(file, 8, [1])
    assert file.read_bytes() == before


@pytest.mark.parametrize("text", ["[1]", "{", '{"model_type": ["llama"]}', '{"num_hidden_layers": "4"}'])
def test_what_is_no_configuration_stays(tmp_path: Path, text: str) -> None:
    (file := tmp_path / CONFIG_FILE).write_text(text)
    assert follow_depth(file, 4, [1]).startswith("config.json is the dense model's")
    assert file.read_text() == text
