"""A slim graph as a stock model: it computes the same, or one line says why there is none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import dotresize_fx
from dotresize_fx.errors import CheckpointError
from dotresize_fx.export import rehearse_checkpoint as rehearsal
from dotresize_fx.export.capture import Captured, sample_inputs
from dotresize_fx.export.checkpoint import largest_difference
from dotresize_fx.export.model_source import LoadedModel
from dotresize_fx.export.rehearse_checkpoint import rehearse_checkpoint
from dotresize_fx.export.stock_model import StockModel, stock_model
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.options import Options
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.passes.sweep_regions import Slimmed
from dotresize_fx.progress import Progress
from dotresize_fx.width_plan import WidthPlan

# Of the largest output: two float32 programs that sum in other orders.
TOLERANCE = 1e-4
Prepared = tuple[LoadedModel, Captured]


@pytest.fixture
def prepared(tiny_graph: Any) -> Callable[[str], Prepared]:
    def make(kind: str) -> Prepared:
        model, graph = tiny_graph(kind)
        loaded = LoadedModel(model, None, None, copy.deepcopy(model.config), "decoder", "", {})
        return loaded, Captured(graph, sample_inputs(97), None, 64, 97)

    return make


def slimmed(dense: FxGraph, tiny_batch: Any, factors: dict[str, int], ratio: float, **options: Any) -> Slimmed:
    data = [tiny_batch(4, 24, 3, seed=seed) for seed in range(3)]
    chosen = Options(ratio=ratio, uniform=True, **options)
    return slim_graph(dense, find_regions(dense), data, chosen, Progress(quiet=True), factors=factors)


@pytest.mark.parametrize(
    ("kind", "regions", "factors"),
    [
        ("qwen2", ("kv_heads",), {"kv_heads": 1}),  # biases
        ("qwen3", ("residual",), {"residual": 1}),  # a norm on heads, whose epsilon stays
        ("gemma", ("residual",), {"residual": 1}),  # gains of one plus a weight, embeddings times the width's root
        ("gpt2", ("ffn",), {"ffn": 1}),  # turned weights, packed
        ("bert", ("ffn",), {"ffn": 1}),
        ("neox", ("ffn",), {"ffn": 1}),  # packed head by head
    ],
)
def test_a_rehearsal_finds_a_stock_model_that_computes_the_same(
    prepared: Callable[[str], Prepared], kind: str, regions: tuple[str, ...], factors: dict[str, int]
) -> None:
    loaded, captured = prepared(kind)
    options = Options(regions=regions, uniform=True, checkpoint=True)
    assert rehearse_checkpoint(loaded, captured, find_regions(captured.graph), options, None) == factors


def test_a_rehearsal_notices_another_model(prepared: Callable[[str], Prepared], monkeypatch: Any) -> None:
    loaded, captured = prepared("gpt2")
    options = Options(regions=("ffn",), uniform=True, checkpoint=True)
    monkeypatch.setattr(rehearsal, "stock_model", lambda *_: StockModel(loaded.model, loaded.config, {}))
    with pytest.raises(CheckpointError, match="whose ffn width is cut computes something else than the slim program"):
        rehearse_checkpoint(loaded, captured, find_regions(captured.graph), options, None)


@pytest.mark.parametrize(
    ("kind", "regions", "factors"),
    [
        ("llama", ("ffn", "residual"), {"residual": 4}),  # a tied head
        ("mixtral", ("ffn", "residual"), {}),  # experts
        ("phi3", ("ffn", "kv_heads"), {}),  # packed projections
    ],
)
def test_a_stock_model_computes_what_the_slim_program_does(
    prepared: Callable[[str], Prepared], tiny_batch: Any, kind: str, regions: tuple[str, ...], factors: dict[str, int]
) -> None:
    loaded, captured = prepared(kind)
    matches = find_regions(captured.graph)
    slim = slimmed(captured.graph, tiny_batch, factors, 0.2, regions=regions)
    made = stock_model(loaded, captured.graph, slim.graph, matches.regions, slim.plan.widths)
    difference, scale, count = largest_difference(made.model, slim.graph, [tiny_batch(2, 19, 5), tiny_batch(1, 40)])
    assert count == 2
    assert difference <= TOLERANCE * scale
    assert made.changes.keys() & {"intermediate_size", "hidden_size", "num_key_value_heads"}
    assert made.changes.get("tie_word_embeddings") == ((True, False) if kind == "llama" else None)


@pytest.mark.parametrize(
    ("kind", "regions", "why"),
    [
        ("llama", (), "no stock model has a query_key width below 8"),
        ("llama", ("value",), "no LlamaForCausalLM has a value width"),
        ("gpt2", ("residual",), "a cut stream's layer norms become RMSNorms"),
        ("neox", ("kv_heads",), "no GPTNeoXForCausalLM has a kv_heads width of 2 for 4"),
        ("bert", ("kv_heads",), "is not a multiple of the number of attention heads"),
    ],
)
def test_says_before_the_work_what_no_stock_model_has(
    prepared: Callable[[str], Prepared], kind: str, regions: tuple[str, ...], why: str
) -> None:
    loaded, captured = prepared(kind)
    options = Options(regions=regions, uniform=True, checkpoint=True)
    with pytest.raises(CheckpointError, match=why):
        rehearse_checkpoint(loaded, captured, find_regions(captured.graph), options, None)


def test_a_plan_of_uneven_widths_is_refused(prepared: Callable[[str], Prepared]) -> None:
    loaded, captured = prepared("llama")
    matches = find_regions(captured.graph)
    first, second = (region.name for region in matches.of_kind("ffn"))
    uneven = WidthPlan({first: 48, second: 40})
    with pytest.raises(CheckpointError, match=r"2 ffn widths of 64 would be from 40 to 48, .* cut with --uniform"):
        rehearse_checkpoint(loaded, captured, matches, Options(plan=Path("plan.json"), checkpoint=True), uneven)


def test_a_stream_and_heads_that_the_configuration_does_not_take_together_are_refused(
    prepared: Callable[[str], Prepared],
) -> None:
    loaded, captured = prepared("llama")
    matches = find_regions(captured.graph)
    stream = next(region.name for region in matches.of_kind("residual"))
    widths = {region.name: 1 for region in matches.of_kind("kv_heads")}  # two query heads
    with pytest.raises(CheckpointError, match=r"hidden size \(26\) is not a multiple"):
        rehearse_checkpoint(
            loaded,
            captured,
            matches,
            Options(plan=Path("plan.json"), checkpoint=True),
            WidthPlan({stream: 26} | widths),
        )


def test_save_writes_what_from_pretrained_loads_and_generates_with(save_tiny_model: Any, tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model", num_key_value_heads=2)
    result = dotresize_fx.slim(
        str(source),
        0.2,
        regions=("ffn",),
        uniform=True,
        calibration_tokens=256,
        sequence_length=32,
        evaluation_tokens=64,
    )
    figures = result.save(tmp_path / "out", checkpoint=True).figures.checkpoint
    assert figures is not None
    assert figures.tokens_equal is not None
    place = tmp_path / "out" / "checkpoint"
    assert {file.suffix for file in place.iterdir()} <= {".json", ".safetensors"}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(place)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    assert model.config.intermediate_size == figures.config_changes["intermediate_size"][1] < 64
    assert figures.parameters == sum(parameter.numel() for parameter in model.parameters())
    inputs = tokenizer("slim", return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    found = model.generate(**inputs, max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None)
    assert found.shape[1] == inputs["input_ids"].shape[1] + 32
    torch.testing.assert_close(
        model(found).logits,
        Execution(result.slim).outputs({"input_ids": found, "attention_mask": torch.ones_like(found)})[0],
        rtol=0,
        atol=TOLERANCE,
    )
