"""Reduced-order linears of whole tiny models: exact at full rank, ours below published, counted and emitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from dotresize_fx.cost import count_cost
from dotresize_fx.errors import UsageError
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.onnx_session import open_session
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.factorize_graph import Factorized, factorize_graph, published_ranks
from dotresize_fx.progress import Progress
from dotresize_fx.rank.rank_sweep import RankCut

Batch = Mapping[str, torch.Tensor]
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def batches(tiny_batch: Callable[..., Batch]) -> list[Batch]:
    return [tiny_batch(4, 24, 5, seed=seed) for seed in range(9)]


def cut(graph: FxGraph, batches: list[Batch], ratio: float = 0.2, **how: Any) -> Factorized:
    return factorize_graph(graph, batches, published_ranks(graph, ratio), QUIET, check=True, **how)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "neox"])
@pytest.mark.parametrize("published", [True, False])
def test_at_full_rank_outputs_stay(
    tiny_graph: Any, batches: list[Batch], run: Any, difference: Any, kind: str, published: bool
) -> None:
    _, dense = tiny_graph(kind)
    whole = [
        RankCut(one.op, min(dense.weight(dense.op(one.op)).shape), one.target)
        for one in published_ranks(dense, 0.3, everywhere=True)
    ]
    found = factorize_graph(dense, batches, whole, QUIET, published=published, guard=False, check=True)
    # Of the largest output; ours solves for what the published form has at once.
    assert difference(run(found.graph, **batches[0]), run(dense, **batches[0])) < 1e-4


def test_ours_loses_less_than_published(tiny_graph: Any, batches: list[Batch], run: Any, difference: Any) -> None:
    _, dense = tiny_graph("llama")
    expected = run(dense, **batches[8])
    lost = {
        published: float((run(cut(dense, batches, published=published).graph, **batches[8])[0] - expected[0]).norm())
        for published in (True, False)
    }
    assert lost[False] < 0.95 * lost[True]


def test_the_last_blocks_alone_are_cut_and_all_is_counted(tiny_graph: Any, batches: list[Batch]) -> None:
    _, dense = tiny_graph("llama")
    found = cut(dense, batches, published=True)
    assert set(found.ranks) == {f"linear_{i}" for i in range(7, 14)}
    before, after = count_cost(dense, 16), count_cost(found.graph, 16)
    weights = sum(
        rank * sum(dense.weight(dense.op(name)).shape) - dense.weight(dense.op(name)).numel()
        for name, rank in found.ranks.items()
    )
    assert after.block_linear_weights == before.block_linear_weights + weights
    assert after.block_macs_per_token == before.block_macs_per_token + weights
    assert after.block_linear_weights <= 0.8 * before.block_linear_weights
    assert set(found.errors) == set(found.ranks)


def test_the_dense_graph_stays_as_it_was(tiny_graph: Any, batches: list[Batch], run: Any) -> None:
    _, dense = tiny_graph("llama")
    before = run(dense, **batches[0])[0]
    cut(dense, batches)
    assert torch.equal(run(dense, **batches[0])[0], before)


def test_what_adds_to_the_stream_knows_it(tiny_graph: Any) -> None:
    _, dense = tiny_graph("llama")
    targets = {one.op: one.target for one in published_ranks(dense, 0.2)}
    assert {name for name, target in targets.items() if target} == {"linear_10", "linear_13"}


def test_a_head_and_a_tied_table_are_no_part_of_it(tiny_graph: Any) -> None:
    _, dense = tiny_graph("llama")
    assert "linear_14" not in {one.op for one in published_ranks(dense, 0.5, everywhere=True)}


@pytest.mark.parametrize("rank", [0, 40])
def test_a_rank_beyond_the_linear_is_refused(tiny_graph: Any, batches: list[Batch], rank: int) -> None:
    _, dense = tiny_graph("llama")
    with pytest.raises(UsageError, match=f"linear_7: a rank of {rank} does not go with 32 x 32"):
        factorize_graph(dense, batches, [RankCut("linear_7", rank)], QUIET)


def test_the_onnx_holds_both_factors(
    tiny_captured: Any, tiny_graph: Any, batches: list[Batch], run: Any, difference: Any, tmp_path: Path
) -> None:
    model, captured = tiny_captured("llama")
    found = cut(tiny_graph("llama")[1], batches)
    path = emit_onnx(model, captured, found.graph, tmp_path)
    shapes = [tuple(sorted(one.dims)) for one in onnx.load(path, load_external_data=False).graph.initializer]
    for rank in (9, 12):  # of 32 x 32 and of 64 x 32, whichever way round they lie
        assert shapes.count((rank, 32)) >= 2
    assert shapes.count((12, 64)) == 3
    given = {name: value.numpy() for name, value in batches[0].items()}
    put_out = open_session(path).run(None, given)[0]
    # Both float32, sums in other orders.
    assert difference([torch.from_numpy(put_out)], run(found.graph, **batches[0])[:1]) < 1e-4
