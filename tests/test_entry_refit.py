"""What reads a cut stream behind a norm is refitted to what the dense reader puts out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dotresize_fx.cost import CostModel
from dotresize_fx.entry_refit import Entry, head_entry
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.options import Options
from dotresize_fx.passes.cut_stream import apply_map, cut_stream
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.progress import Progress
from dotresize_fx.slim_stream import SlimStream
from dotresize_fx.sweep import Sweep

QUIET = Progress(quiet=True)
REFIT = [(method, basis) for method in ("pca", "magnitude") for basis in ("shared", "sublayer")]


@pytest.fixture(scope="module")
def data(tiny_batch: Any) -> list[Any]:
    return [tiny_batch(8, 32, 3, seed=seed) for seed in range(9)]


def cut(dense: FxGraph, data: list[Any], width: int, basis: str = "shared") -> tuple[FxGraph, SlimStream]:
    slim = dense.copy()
    options = Options(regions=("residual",), basis=basis)
    return slim, cut_stream(slim, find_regions(slim), data, CostModel(), 0.1, options, QUIET, width).stream


def sweep(dense: FxGraph, slim: FxGraph, data: list[Any], stream: SlimStream, **options: Any) -> Sweep:
    return Sweep(dense, slim, data, lambda one, found: apply_map(slim, one, found, False), stream=stream, **options)


def logits_error(dense: FxGraph, slim: FxGraph, batch: Any) -> float:
    expected, found = (Execution(graph).outputs(batch)[0] for graph in (dense, slim))
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_at_full_width_the_refit_finds_what_was_there(
    tiny_graph: Any, tiny_batch: Any, data: list[Any], kind: str
) -> None:
    _, dense = tiny_graph(kind)
    slim, stream = cut(dense, data, 32)
    swept = sweep(dense, slim, data, stream)
    for region in list(find_regions(slim).of_kind("ffn")):
        swept.slim_sublayer([(region, region.width)], lambda _: [])
    swept.finish()
    # But for the ridges: a reader's, 1e-6 of a mean eigenvalue, and the metric's, 1e-4.
    assert logits_error(dense, slim, tiny_batch(2, 9, seed=77)) < 1e-3


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_cut_stream_is_read_better(tiny_graph: Any, tiny_batch: Any, data: list[Any], kind: str) -> None:
    """Readers alone are refitted: nothing else tells the two graphs apart."""
    _, dense = tiny_graph(kind)
    unseen = tiny_batch(8, 32, seed=77)
    slim, stream = cut(dense, data, 24)
    before = logits_error(dense, slim, unseen)
    swept = sweep(dense, slim, data, stream)
    swept.finish()  # no sublayer was walked: all readers at once, on the slim stream as it was
    assert logits_error(dense, slim, unseen) < 0.95 * before


def test_the_head_keeps_its_table(tiny_graph: Any, data: list[Any]) -> None:
    """In front of a tied head stands a matrix: it alone is refitted, in the metric of the answers."""
    _, dense = tiny_graph("llama")
    slim, stream = cut(dense, data, 24)
    table = next(op for op in slim.ops if op.kind == "embedding")
    before = slim.weight(table).clone()
    swept = sweep(dense, slim, data, stream)
    (name,) = (name for name in stream.normed if name not in dense.positions)
    entry = head_entry(slim, swept.dense, name, swept.masks)
    assert entry is not None
    assert entry.weight.shape == (24, 33)
    head = slim.op(entry.head)
    assert head.weight == table.weight
    # The least squares of the tables: no other (24, 32) comes nearer in the metric; the plain one is near it.
    narrow, wide = slim.weight(head).double(), dense.weight(dense.op(entry.head)).double()
    plain = torch.linalg.lstsq(narrow, wide).solution
    assert float((entry.weight[:, :-1] - plain).norm() / plain.norm()) < 0.5
    swept.finish()
    assert torch.equal(slim.weight(slim.op(table.name)), before)
    assert len(slim.users(slim.op(entry.head).weight)) == 2


def test_a_weight_that_others_share_is_no_entry(tiny_graph: Any) -> None:
    _, graph = tiny_graph("llama")
    head = [op for op in graph.ops if op.is_linear][-1]
    assert Entry.of(graph, graph, head.name) is None
    first = next(op for op in graph.ops if op.is_linear)
    found = Entry.of(graph, graph, first.name)
    assert found is not None
    assert found.weight.shape == (32, 33)


@pytest.mark.parametrize(("method", "basis"), REFIT)
def test_refitted_it_is_nearer_to_the_dense_model(
    tiny_graph: Any, tiny_batch: Any, data: list[Any], method: str, basis: str
) -> None:
    _, dense = tiny_graph("gpt2")
    unseen = tiny_batch(8, 32, seed=77)
    options = Options(ratio=0.2, regions=("residual",), method=method, basis=basis)
    errors = []
    for refit in (False, True):
        slimmed = slim_graph(dense, find_regions(dense), data, options, QUIET, refit=refit)
        errors.append(logits_error(dense, slimmed.graph, unseen))
    assert errors[1] < 0.9 * errors[0]


def test_repair_refines_all_of_a_sublayer(tiny_graph: Any, data: list[Any]) -> None:
    """Behind a cut stream nothing of a sublayer stays: queries and keys move like the rest."""
    _, dense = tiny_graph("llama")
    options = Options(ratio=0.2, regions=("residual",), effort="best", repair_steps=40)
    fitted, repaired = (
        slim_graph(dense, find_regions(dense), data, chosen, QUIET)
        for chosen in (Options(ratio=0.2, regions=("residual",)), options)
    )
    moved = {
        op.name
        for op in repaired.graph.ops
        if op.kind == "linear"
        and not torch.equal(repaired.graph.weight(op), fitted.graph.weight(fitted.graph.op(op.name)))
    }
    linears = [op.name for op in repaired.graph.ops if op.kind == "linear"]
    assert moved == set(linears[:-1])  # the head itself is the embedding's table
    for entry in repaired.swept[1:]:
        if "loss before repair" in entry.notes:
            assert entry.notes["loss after repair"] < entry.notes["loss before repair"]
    notes = repaired.swept[-1].notes
    assert notes["loss after repair of the head"] <= notes["loss before repair of the head"]
