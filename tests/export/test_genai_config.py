"""What ONNX Runtime GenAI is told, and, where it is installed, what it makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dotresize_fx.export.capture_cache import capture_with_cache
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.genai_config import GENAI_FILE, write_genai_config
from dotresize_fx.export.greedy import greedy
from dotresize_fx.export.onnx_session import OnnxModel
from dotresize_fx.fx_form.graph import FxGraph

LONGEST = 64


@pytest.fixture(scope="module")
def captured(tiny_model: Callable[..., Any]) -> tuple[Any, Any]:
    model = tiny_model("llama")
    return model, capture_with_cache(model)


def test_what_it_says(captured: tuple[Any, Any], tmp_path: Path) -> None:
    model, found = captured
    assert write_genai_config(found.graph, model.config, LONGEST, tmp_path) == ""
    told = json.loads((tmp_path / GENAI_FILE).read_text())["model"]
    decoder = told["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 2, 8)
    assert set(decoder["inputs"]) >= {"input_ids", "attention_mask", "position_ids", "past_key_names"}
    assert (told["vocab_size"], told["context_length"], told["eos_token_id"]) == (97, LONGEST, 2)


def test_caches_of_several_sizes_are_none_of_its(captured: tuple[Any, Any], tmp_path: Path) -> None:
    model, found = captured
    graph: FxGraph = found.graph.copy()
    graph.resize_input("past_key_values_1_value", {3: 6})
    assert "--head-sizes equal --uniform" in write_genai_config(graph, model.config, LONGEST, tmp_path)
    model.config.eos_token_id = None
    assert "no token that ends a text" in write_genai_config(found.graph, model.config, LONGEST, tmp_path)
    model.config.eos_token_id = 2
    assert list(tmp_path.iterdir()) == []


def test_it_generates_the_same_tokens(captured: tuple[Any, Any], tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime_genai")
    model, found = captured
    path = emit_onnx(model, found, found.graph, tmp_path)
    write_genai_config(found.graph, model.config, LONGEST, tmp_path)
    ids = torch.randint(0, 97, (1, 8), generator=torch.Generator().manual_seed(1)).numpy()
    tokens = greedy(OnnxModel(path, threads=1), ids, np.ones_like(ids))
    expected = [int(next(tokens)[0]) for _ in range(24)]
    loaded = runtime.Model(str(tmp_path))
    parameters = runtime.GeneratorParams(loaded)
    parameters.set_search_options(max_length=LONGEST, do_sample=False)
    generator = runtime.Generator(loaded, parameters)
    generator.append_tokens(ids[0].astype(np.int32))
    given = []
    while len(given) < len(expected) and not generator.is_done():
        generator.generate_next_token()
        given.append(int(generator.get_next_tokens()[0]))
    assert given == expected[: len(given)]
    assert len(given) > 1
