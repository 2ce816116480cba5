"""Fewer blocks as a stock model: it computes the same under its own class, or one line says why there is none."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dotresize_fx.errors import CheckpointError, UsageError
from dotresize_fx.export import rehearse_depth as rehearsal
from dotresize_fx.export.capture import Captured, capture, sample_inputs
from dotresize_fx.export.model_source import LoadedModel
from dotresize_fx.export.rehearse_depth import rehearse_depth
from dotresize_fx.export.stock_layers import StockLayers
from dotresize_fx.export.stock_model import StockModel, stock_model
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.options import Options
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.drop_layers import DropLayers
from dotresize_fx.passes.find_blocks import find_blocks
from dotresize_fx.passes.merge_graph import merge_graph
from dotresize_fx.passes.prove_exactness import redraw_parameters
from dotresize_fx.progress import Progress

# Of the largest output: two float32 programs that sum in other orders.
TOLERANCE = 1e-4
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGES = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
Prepared = tuple[LoadedModel, Captured]


def loaded(model: Any) -> LoadedModel:
    return LoadedModel(model, None, None, copy.deepcopy(model.config), "decoder", "", {})


def prepared(model: Any, sample: Any = None) -> Prepared:
    model.config.use_cache = False
    redraw_parameters(model.eval())
    captured = capture(model, sample)
    canonicalise(captured.graph)
    return loaded(model), captured


def rehearsed_and_compared(
    found: Prepared, batches: Sequence[Any], inputs: Any, method: str, count: int, place: Path
) -> Any:
    """The stock model of what ``method`` leaves, as from_pretrained loads it."""
    source, captured = found
    rehearse_depth(source, captured, Options(merge=count, merge_method=method, checkpoint=True))
    merged = merge_graph(captured.graph, batches, count, Progress(quiet=True), method, refit=method == "aligned")
    made = stock_model(source, captured.graph, merged.graph, (), {}, merged.gone)
    made.model.save_pretrained(place)
    model: Any = type(source.model).from_pretrained(place, dtype=torch.float32).eval()
    expected = Execution(merged.graph).outputs(inputs)[0]
    with torch.no_grad():
        difference = (model(**inputs)[0] - expected).abs()
    if "attention_mask" in inputs:
        difference = difference[inputs["attention_mask"].bool()]
    assert float(difference.max()) <= TOLERANCE * float(expected.abs().max())
    return model


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("gpt2", "mka"),  # n_layer
        ("llama", "aligned"),
        ("qwen3", "mka"),  # layer_types
        ("bert", "mka"),
        ("opt", "drop-last"),
    ],
)
def test_a_stock_model_computes_what_is_left(
    tiny_graph: Any, tiny_batch: Any, kind: str, method: str, tmp_path: Path
) -> None:
    model, graph = tiny_graph(kind)
    found = loaded(model), Captured(graph, sample_inputs(97), None, 64, 97)
    batches = [tiny_batch(4, 24, 3, seed=seed) for seed in range(8)]
    slim = rehearsed_and_compared(found, batches, tiny_batch(2, 19, 5), method, 1, tmp_path)
    assert slim.config.num_hidden_layers == 1
    assert len(getattr(slim.config, "layer_types", None) or [0]) == 1


@pytest.fixture(scope="module")
def alternating() -> Prepared:
    more = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "layer_types": ALTERNATING}
    config = transformers.Gemma3TextConfig(**SIZES, **more, num_hidden_layers=4)
    return prepared(transformers.Gemma3ForCausalLM(config))


@pytest.mark.parametrize("method", ["drop-last", "drop-least"])
def test_layers_that_alternate(alternating: Prepared, tiny_batch: Any, method: str, tmp_path: Path) -> None:
    batches = [tiny_batch(4, 24, 3, seed=seed) for seed in range(8)]
    model = rehearsed_and_compared(alternating, batches, tiny_batch(2, 19, 5), method, 1, tmp_path)
    assert model.config.num_hidden_layers == len(model.config.layer_types) == 3
    if method == "drop-last":
        assert model.config.layer_types == ALTERNATING[:3]
    inputs = tiny_batch(1, 12)
    cached, whole = (
        model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(cached, whole)


def test_an_image_model(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = [{"pixel_values": torch.randn(8, 3, 16, 16, generator=generator)} for _ in range(3)]
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGES, num_hidden_layers=3))
    found = prepared(model, {"pixel_values": images[0]["pixel_values"][:2]})
    slim = rehearsed_and_compared(found, images[:2], images[2], "mka", 1, tmp_path)
    assert slim.config.num_hidden_layers == len(slim.vit.layers) == 2


@pytest.mark.parametrize(
    ("kind", "given", "gone", "expected"),
    [
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "num_key_value_heads": 2},
            {0},
            {"max_window_layers": 1, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        ),
        (
            "Qwen2Moe",
            {"mlp_only_layers": [1, 3], "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
            {0, 1},
            {"mlp_only_layers": [1], "num_experts": 4},
        ),
        ("SmolLM3", {"num_key_value_heads": 2}, {1}, {"no_rope_layers": [1, 1, 0]}),
        (
            "DeepseekV3",
            {"first_k_dense_replace": 2, "n_routed_experts": 8, "num_key_value_heads": 4, "topk_group": 1},
            {1},
            {"first_k_dense_replace": 1},
        ),
    ],
)
def test_what_a_configuration_says_of_layers_closes_up(
    kind: str, given: dict[str, Any], gone: set[int], expected: dict[str, Any]
) -> None:
    config = getattr(transformers, f"{kind}Config")(**SIZES, **given, num_hidden_layers=4)
    layers = StockLayers("model.layers.", 4, frozenset(gone))
    found, shapes = layers.shallow(getattr(transformers, f"{kind}ForCausalLM"), config)
    assert {name: getattr(found, name) for name in expected} == expected
    assert {key.split(".")[2] for key in shapes if "layers." in key} == {str(i) for i in range(4 - len(gone))}


def test_gpt_neo_says_its_attention_twice() -> None:
    config = transformers.GPTNeoConfig(
        vocab_size=97, hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]]
    )
    layers = StockLayers("transformer.h.", 4, frozenset({0}))
    found, _ = layers.shallow(transformers.GPTNeoForCausalLM, config)
    assert found.attention_layers == ["local", "global", "local"]
    assert found.attention_types == [[["local"], 1], [["global"], 1], [["local"], 1]]


@pytest.mark.parametrize(
    ("kind", "given", "why"),
    [
        ("DiffLlama", {}, r"layer 1 would be layer 0 of a stock DiffLlamaForCausalLM, with lambda_init 0\.2"),
        ("Qwen2Moe", {"decoder_sparse_step": 2, "num_experts": 4}, "with class Qwen2MoeMLP for Qwen2MoeSparseMoeBlock"),
    ],
)
def test_a_layer_that_would_be_another_behind_fewer(kind: str, given: dict[str, Any], why: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**SIZES, **given, num_key_value_heads=2, num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=why):
        StockLayers("model.layers.", 4, frozenset({0})).shallow(getattr(transformers, f"{kind}ForCausalLM"), config)


def test_names_close_up() -> None:
    layers = StockLayers("h.", 12, frozenset({0, 10}))
    assert layers.renamed("h.11.attn.weight") == "h.9.attn.weight"
    assert layers.renamed("h.1") == "h.0"
    assert layers.renamed("head.1.weight") == "head.1.weight"
    assert (layers.number("h.3.weight"), layers.number("ln.3.weight"), layers.number("h.weight")) == (3, None, None)


def test_scores_that_are_scaled_by_the_layers_number_are_refused_first(tiny_graph: Any) -> None:
    model, graph = tiny_graph("gpt2")
    source = loaded(model)
    source.config.scale_attn_by_inverse_layer_idx = True
    captured = Captured(graph, sample_inputs(97), None, 64, 97)
    with pytest.raises(CheckpointError, match=r"with scaling 0\.\d+ for 0\.\d+, .*--merge-method drop-last leaves"):
        rehearse_depth(source, captured, Options(merge=1, merge_method="drop-least", checkpoint=True))


def test_a_rehearsal_notices_another_model_and_too_many_blocks(tiny_graph: Any, monkeypatch: Any) -> None:
    model, graph = tiny_graph("gpt2")
    found = loaded(model), Captured(graph, sample_inputs(97), None, 64, 97)
    with pytest.raises(UsageError, match="the model has 2 blocks"):
        rehearse_depth(*found, Options(merge=2, checkpoint=True))
    monkeypatch.setattr(rehearsal, "stock_model", lambda *_: StockModel(model, model.config, {}))
    with pytest.raises(CheckpointError, match="with fewer layers computes something else than the slim program"):
        rehearse_depth(*found, Options(merge=1, checkpoint=True))


def test_the_wrong_block_is_noticed(tiny_graph: Callable[[str], Any]) -> None:
    model, graph = tiny_graph("llama")
    slim = graph.copy()
    DropLayers([find_blocks(slim)[0]])(slim)
    with pytest.raises(CheckpointError, match="is gone from the slim program"):
        stock_model(loaded(model), graph, slim, (), {}, (1,))


def test_a_module_in_memory_is_refused(tiny_graph: Any) -> None:
    model, graph = tiny_graph("llama")
    source = dataclasses.replace(loaded(model), config=None)
    with pytest.raises(CheckpointError, match="a module in memory comes without what a stock model is made of"):
        rehearse_depth(source, Captured(graph, {}, None, 64, 97), Options(merge=1, checkpoint=True))
