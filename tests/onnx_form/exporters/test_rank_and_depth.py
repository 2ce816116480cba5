"""Linears of a lower rank and fewer blocks in files of every exporter: exact, and as from the program itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers

from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.export import prove_onnx
from dotresize_fx.export.capture_cache import capture_with_cache
from dotresize_fx.export.onnx_session import open_session
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.factorize_graph import factorize_graph, published_ranks
from dotresize_fx.passes.merge_graph import merge_graph
from dotresize_fx.progress import Progress
from dotresize_fx.rank.rank_sweep import RankCut

pytest.importorskip("onnxruntime")

Batch = Mapping[str, torch.Tensor]
QUIET = Progress(quiet=True)
LAYERS = 3
# Of the largest output: two runtimes sum in other orders, and what is solved for follows.
AGREE = 1e-3
EXACT = 1e-4


def drawn(seed: int, positions: bool) -> Batch:
    """Four sequences, the first padded on the left; positions count along the mask."""
    ids = torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    places = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if positions else {}
    return {"input_ids": ids, "attention_mask": mask, **places}


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return [drawn(seed, positions=True) for seed in range(10)]


@pytest.fixture(scope="module")
def both(exported: Callable[..., Path], tiny_model: Callable[..., Any]) -> tuple[FxGraph, OnnxGraph]:
    """One model as a program, and as the file that our own exporter writes of it; both with a cache."""
    program = capture_with_cache(tiny_model("llama", layers=LAYERS)).graph
    canonicalise(program)
    return program, opened(exported("llama", "any", LAYERS))


def opened(path: Path) -> OnnxGraph:
    graph = OnnxGraph(ir.load(path))
    canonicalise(graph)
    return graph


def away(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def answers(graph: FxGraph | OnnxGraph, batch: Batch) -> torch.Tensor:
    run = OnnxExecution(graph).outputs if isinstance(graph, OnnxGraph) else Execution(graph).outputs
    return run(batch)[0]


@pytest.mark.parametrize("published", [True, False])
def test_both_ways_give_the_same_ranks(both: tuple[FxGraph, OnnxGraph], batches: list[Batch], published: bool) -> None:
    one, other = (
        factorize_graph(graph, batches, published_ranks(graph, 0.3), QUIET, published=published, check=True)
        for graph in both
    )
    assert list(one.ranks.values()) == list(other.ranks.values())
    assert list(other.errors.values()) == pytest.approx(list(one.errors.values()), rel=1e-3)
    expected = answers(one.graph, batches[9])
    assert away(answers(other.graph, batches[9]), expected) < AGREE
    assert away(answers(both[0], batches[9]), expected) > 10 * AGREE  # there was something to agree on


@pytest.mark.parametrize("method", ["mka", "aligned", "drop-least", "drop-last"])
def test_both_ways_take_the_same_blocks(both: tuple[FxGraph, OnnxGraph], batches: list[Batch], method: str) -> None:
    one, other = (
        merge_graph(graph, batches, 1, QUIET, method, refit=method == "aligned", check=True) for graph in both
    )
    assert one.gone == other.gone
    assert other.alphas == pytest.approx(one.alphas, rel=1e-3)
    assert len(other.graph.caches) == len(one.graph.caches) == 2 * (LAYERS - 1)
    expected = answers(one.graph, batches[9])
    assert away(answers(other.graph, batches[9]), expected) < AGREE
    assert away(answers(both[0], batches[9]), expected) > 10 * AGREE


def test_several_merges_go_from_the_back(both: tuple[FxGraph, OnnxGraph], batches: list[Batch]) -> None:
    one, other = (merge_graph(graph, batches, 2, QUIET, "mka", check=True) for graph in both)
    assert one.gone == other.gone == (1, 0)
    assert away(answers(other.graph, batches[9]), answers(one.graph, batches[9])) < AGREE


def test_the_file_s_own_graph_merges_as_the_canonical_one(exported: Any) -> None:
    """There GPT-2's linears are products of joined rows, query, key and value in one."""
    given = OnnxGraph(ir.load(exported("gpt2", "any", 2)))
    canonical = given.copy()
    canonicalise(canonical)
    data = [drawn(seed, positions=False) for seed in range(4)]
    one, other = (merge_graph(graph, data, 1, QUIET, "mka", check=True) for graph in (given, canonical))
    assert one.alphas == pytest.approx(other.alphas)
    assert away(answers(one.graph, data[0]), answers(other.graph, data[0])) < EXACT


@pytest.mark.parametrize(("kind", "way"), [("llama", "cpu"), ("bert", "dynamo"), ("gpt2", "script")])
@pytest.mark.parametrize("published", [True, False])
def test_at_full_rank_outputs_stay(exported: Any, kind: str, way: str, published: bool) -> None:
    dense = opened(exported(kind, way, LAYERS if way == "cpu" else 2))
    data = [drawn(seed, positions=False) for seed in range(3)]
    cuts = published_ranks(dense, 0.3, everywhere=True)
    whole = [RankCut(cut.op, min(dense.weight(dense.op(cut.op)).shape), cut.target) for cut in cuts]
    assert len(whole) == (7 * LAYERS if way == "cpu" else 12)
    assert any(cut.target for cut in whole)
    found = factorize_graph(dense, data, whole, QUIET, published=published, guard=False, check=True)
    assert away(answers(found.graph, data[0]), answers(dense, data[0])) < EXACT


@pytest.mark.parametrize(
    ("kind", "way", "options", "against"),
    [
        ("llama", "cpu", ("--method", "rank"), prove_onnx.PRODUCTS),  # fused: sums with norms, attention, packed
        ("gpt2", "script", ("--method", "rom"), prove_onnx.PRODUCTS),
        ("llama", "cpu", ("--merge", "1"), prove_onnx.PASSED),
        ("bert", "dynamo", ("--merge", "1", "--merge-method", "drop-last"), prove_onnx.PASSED),
        ("gpt2", "script", ("--merge", "1", "--merge-method", "aligned"), prove_onnx.PASSED),
    ],
)
def test_what_an_exporter_wrote_is_reduced(
    slim: Callable[..., Any], kind: str, way: str, options: tuple[str, ...], against: str
) -> None:
    layers = LAYERS if way == "cpu" else 2
    path, out, report = slim(kind, way, *options, layers=layers, rows=60)
    assert report["summary"]["verified"]
    assert report["figures"]["verification"]["against"] == against
    went = 1 / layers if "--merge" in options else 0.2
    assert report["summary"]["block_weights_removed"] == pytest.approx(went, abs=0.03)
    blocks, ranks = report["removed_blocks"], report["low_rank_linears"]
    assert len(blocks) == ("--merge" in options)
    assert bool(ranks) == ("--merge" not in options)
    assert all(row["rank"] * (row["d_in"] + row["d_out"]) <= row["d_in"] * row["d_out"] for row in ranks)
    assert sum(row["kind"] == "ffn" for row in report["regions"]) == layers - len(blocks)
    before, after = (onnx.load(file, load_external_data=False) for file in (path, out / "model.onnx"))
    if "--merge" not in options:
        assert [value.name for value in before.graph.input] == [value.name for value in after.graph.input]
    assert {node.domain for node in after.graph.node} <= {node.domain for node in before.graph.node}


@pytest.fixture
def beside_a_config(exported: Any) -> Iterator[Path]:
    """A Llama's file, for as long as a test lasts beside its configuration."""
    path: Path = exported("llama", "any", LAYERS)
    transformers.LlamaConfig(num_hidden_layers=LAYERS).save_pretrained(path.parent)
    yield path
    path.with_name("config.json").unlink()


def test_a_file_without_a_block_goes_on_behind_a_past(slim: Callable[..., Any], beside_a_config: Path) -> None:
    """Its caches are gone, the others' numbers close up, and a prompt in two goes gives what it gives in one."""
    path, out, _ = slim("llama", "any", "--merge", "1", "--merge-method", "drop-least", layers=LAYERS, rows=60)
    assert path == beside_a_config
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"] == LAYERS - 1
    session = open_session(out / "model.onnx")
    layers = [f"{i}.{part}" for i in range(LAYERS - 1) for part in ("key", "value")]
    names = [one.name for one in session.get_inputs()]
    assert names[3:] == [f"past_key_values.{layer}" for layer in layers]
    assert [one.name for one in session.get_outputs()] == ["logits", *(f"present.{layer}" for layer in layers)]
    ids = np.random.default_rng(0).integers(0, 97, (2, 9))

    def go_on(start: int, stop: int, past: list[Any]) -> list[Any]:
        fed = {
            "input_ids": ids[:, start:stop],
            "attention_mask": np.ones((2, stop), np.int64),
            "position_ids": np.tile(np.arange(start, stop), (2, 1)),
            **dict(zip(names[3:], past, strict=True)),
        }
        found: list[Any] = session.run(None, fed)
        return found

    empty = [np.zeros((2, 2, 0, 8), np.float32) for _ in layers]
    whole = go_on(0, 9, empty)
    second = go_on(6, 9, go_on(0, 6, empty)[1:])
    for found, expected in ((second[0], whole[0][:, 6:]), *zip(second[1:], whole[1:], strict=True)):
        assert np.abs(found - expected).max() < EXACT * np.abs(expected).max()


@pytest.mark.parametrize(
    ("kind", "options", "code", "said"),
    [
        ("albert", ("--merge", "1"), 6, "blocks share one set of weights"),
        ("albert", ("--method", "rank"), 6, "blocks share one set of weights"),
        ("bart", ("--merge", "1", "--merge-method", "drop-last"), 6, "an encoder-decoder model"),
        ("gpt2", ("--merge", "2"), 2, "the model has 2 blocks, of which one at least has to stay"),
    ],
)
def test_what_cannot_be_is_one_line(
    slim: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    kind: str,
    options: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    slim(kind, "script", *options, code=code, layers=2, rows=60)
    error = capsys.readouterr().err
    line = error.strip().splitlines()[-1]
    assert said in line
    assert line.startswith("dotresize-fx: ")


def test_quantised_weights_are_not_averaged(exported: Any, batches: list[Batch], tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    path = tmp_path / "quantised.onnx"
    quantization.quantize_dynamic(exported("llama", "any", LAYERS), path, op_types_to_quantize=["MatMul"])
    graph = opened(path)
    with pytest.raises(NothingToSlimError, match="linears are quantised, and such are not averaged"):
        merge_graph(graph, batches, 1, QUIET, "mka")
    dropped = merge_graph(graph, batches, 1, QUIET, "drop-last", check=True).graph
    assert answers(dropped, batches[0]).isfinite().all()
    with pytest.raises(NothingToSlimError, match="no linear in the blocks has a weight of its own"):
        published_ranks(graph, 0.2)
    quantization.quantize_dynamic(exported("llama", "any", LAYERS), path)
    with pytest.raises(NothingToSlimError, match="its table of tokens is quantised"):
        merge_graph(opened(path), batches, 1, QUIET, "drop-last")
