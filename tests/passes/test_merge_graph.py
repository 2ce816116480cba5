"""Whole tiny models with fewer blocks: what goes, what refitting brings, what is refused, and the ONNX of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dotresize_fx.cost import count_cost
from dotresize_fx.errors import CalibrationError, NothingToSlimError, UsageError
from dotresize_fx.export.cached_runs import onnx_inputs, prompt_inputs
from dotresize_fx.export.capture import Captured, capture
from dotresize_fx.export.capture_cache import capture_with_cache
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.emit_pt2 import emit_pt2
from dotresize_fx.export.onnx_session import open_session
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.drop_layers import DropLayers
from dotresize_fx.passes.find_blocks import find_blocks
from dotresize_fx.passes.merge_graph import merge_graph
from dotresize_fx.progress import Progress

Batch = Mapping[str, torch.Tensor]
QUIET = Progress(quiet=True)
BLOCKS = 4


@pytest.fixture(scope="module")
def batches(tiny_batch: Callable[..., Batch]) -> list[Batch]:
    return [tiny_batch(4, 24, 5, seed=seed) for seed in range(9)]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Any:
    """Four blocks that each add little, as those of a trained model do."""
    found = tiny_model("llama", layers=BLOCKS)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.3)
    return found


@pytest.fixture(scope="module")
def captured(model: Any) -> Captured:
    found = capture_with_cache(model)
    canonicalise(found.graph)
    return found


def lost(graph: FxGraph, dense: FxGraph, batch: Batch) -> float:
    found, expected = (Execution(one).outputs(batch)[0] for one in (graph, dense))
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", ["mka", "aligned", "drop-last", "drop-least"])
def test_so_many_blocks_go(captured: Captured, batches: list[Batch], method: str) -> None:
    found = merge_graph(captured.graph, batches, 2, QUIET, method, check=True)
    assert len(found.gone) == 2
    assert len(find_blocks(found.graph)) == BLOCKS - 2
    assert len(found.graph.caches) == 2 * (BLOCKS - 2)
    before, after = (count_cost(graph, 1).block_linear_weights for graph in (captured.graph, found.graph))
    assert after == before * (BLOCKS - 2) // BLOCKS
    assert found.notes[0].startswith(f"{method}: 2 blocks went, 50.0% of the block weights")
    assert all(0 <= alpha <= 1 for alpha in found.alphas)
    assert len(found.alphas) == (2 if method in ("mka", "aligned") else 0)
    assert found.gone == (3, 2) or method != "drop-last"


def test_dropping_the_last_is_what_it_says(captured: Captured, batches: list[Batch]) -> None:
    found = merge_graph(captured.graph, [], 1, QUIET, "drop-last")
    by_hand = captured.graph.copy()
    DropLayers(find_blocks(by_hand)[-1:])(by_hand)
    assert lost(found.graph, by_hand, batches[0]) == 0


@pytest.mark.parametrize("method", ["mka", "aligned"])
def test_refitting_brings_the_stream_back(captured: Captured, batches: list[Batch], method: str) -> None:
    bare, refitted = (
        merge_graph(captured.graph, batches[:8], 1, QUIET, method, refit=refit, check=True) for refit in (False, True)
    )
    assert refitted.gone == bare.gone
    assert lost(refitted.graph, captured.graph, batches[8]) < 0.8 * lost(bare.graph, captured.graph, batches[8])


def test_two_runs_are_the_same(captured: Captured, batches: list[Batch]) -> None:
    one, other = (merge_graph(captured.graph, batches, 2, QUIET, "aligned") for _ in range(2))
    assert one.alphas == other.alphas
    assert lost(one.graph, other.graph, batches[0]) == 0


@pytest.mark.parametrize("count", [0, 4, 11])
def test_more_blocks_than_there_are(captured: Captured, batches: list[Batch], count: int) -> None:
    with pytest.raises(UsageError, match=f"--merge {count}: "):
        merge_graph(captured.graph, batches, count, QUIET)


def test_an_unknown_method(captured: Captured, batches: list[Batch]) -> None:
    with pytest.raises(UsageError, match="--merge-method best: choose one of mka, aligned, drop-last, drop-least"):
        merge_graph(captured.graph, batches, 1, QUIET, "best")


def test_too_little_text_to_tell_how_alike_they_are(captured: Captured, batches: list[Batch]) -> None:
    with pytest.raises(CalibrationError, match="91 calibration tokens say too little"):
        merge_graph(captured.graph, batches[:1], 1, QUIET)


def test_alternating_layers_and_shared_ones(batches: list[Batch]) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    kinds = ["sliding_attention", "full_attention"] * 2
    windows = {"use_sliding_window": True, "sliding_window": 4, "layer_types": kinds, "num_key_value_heads": 2}
    alternating = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**sizes, **windows, num_hidden_layers=4, use_cache=False)
    )
    graph = capture(alternating.eval()).graph
    canonicalise(graph)
    with pytest.raises(UsageError, match="layer types alternate"):
        merge_graph(graph, batches, 1, QUIET)
    assert merge_graph(graph, batches, 1, QUIET, "drop-least").gone
    shared = transformers.AlbertModel(transformers.AlbertConfig(**sizes, num_hidden_layers=2, embedding_size=32))
    graph = capture(shared.eval()).graph
    canonicalise(graph)
    with pytest.raises(NothingToSlimError, match="share one set of weights"):
        merge_graph(graph, batches, 1, QUIET, "drop-last")


def test_the_onnx_has_the_layers_that_are_left(
    model: Any, captured: Captured, batches: list[Batch], difference: Any, tmp_path: Path
) -> None:
    graph, gone = captured.graph.copy(), (0, 3)
    DropLayers([find_blocks(graph)[i] for i in gone])(graph)
    graph.refresh_shapes()
    path = emit_onnx(model, captured, graph, tmp_path)
    session = open_session(path)
    left = BLOCKS - len(gone)
    layers = [f"{i}.{part}" for i in range(left) for part in ("key", "value")]
    assert [one.name for one in session.get_inputs()][3:] == [f"past_key_values.{layer}" for layer in layers]
    assert [one.name for one in session.get_outputs()] == ["logits", *(f"present.{layer}" for layer in layers)]
    given = prompt_inputs(captured.cache, batches[0]["input_ids"], batches[0]["attention_mask"])
    found = [torch.from_numpy(one) for one in session.run(None, onnx_inputs(graph, given))]
    # Both float32, sums in other orders.
    assert difference(found, Execution(graph, caches=True).outputs(given)) < 1e-4


def test_the_pt2_is_called_with_the_layers_that_are_left(captured: Captured, tmp_path: Path) -> None:
    graph = captured.graph.copy()
    DropLayers([find_blocks(graph)[i] for i in (0, 3)])(graph)
    program = torch.export.load(emit_pt2(captured, graph, tmp_path))
    _, inputs = program.example_inputs
    assert len(inputs["past_key_values"]) == BLOCKS - 2
    found = program.module()(**inputs)
    assert list(found) == ["logits", *(f"present.{i}.{part}" for i in (0, 1) for part in ("key", "value"))]
    inputs["past_key_values"][1]["key"] = inputs["past_key_values"][1]["key"][:, :, :1]
    with pytest.raises(AssertionError, match="Guard failed"):
        program.module()(**inputs)
