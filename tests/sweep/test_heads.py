"""The sweep over heads and sublayers of several regions; the better of several solvers, and repair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import GramAccumulator, token_rows, with_ones
from dotresize_fx.least_squares import refit_reader
from dotresize_fx.passes.cut_stream import apply_map
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.regions import Region
from dotresize_fx.solvers import SOLVERS, Solver, solvers_for
from dotresize_fx.sweep import Solvers, Sweep, SweptRegion

Batch = Mapping[str, torch.Tensor]
WIDTH = 64


def only(method: str) -> Callable[[Region], Solvers]:
    """For every region one solver."""
    return lambda region: [(method, SOLVERS[method])]


CUTS = {"value": 5, "query_key": 4, "kv_heads": 1}


def by_kind(graph: FxGraph, *kinds: str, layer: int = 0) -> list[Region]:
    """One region of each kind, in this order."""
    return [list(find_regions(graph).of_kind(kind))[layer] for kind in kinds]


def swept_sublayer(
    dense: FxGraph,
    batches: Sequence[Batch],
    cuts: Sequence[tuple[Region, int]],
    solvers: Callable[[Region], Solvers] = lambda region: solvers_for("auto", region.kind),
    **options: Any,
) -> tuple[FxGraph, list[SweptRegion]]:
    slim = dense.copy()
    swept = Sweep(dense, slim, batches, lambda region, found: apply_map(slim, region, found, False), **options)
    return slim, swept.slim_sublayer(cuts, solvers)


def value_at(graph: FxGraph, name: str, batch: Batch) -> torch.Tensor:
    execution, node = Execution(graph), graph.node(name)
    found: torch.Tensor = execution.run(execution.start(batch), 0, execution.index[node] + 1, keep=[node])[node]
    return found


def stream_error(dense: FxGraph, slim: FxGraph, target: str, batches: Sequence[Batch]) -> float:
    """Relative, of the stream behind a sublayer, over all real tokens."""
    error = energy = 0.0
    for batch in batches:
        one, other = (token_rows(value_at(graph, target, batch), batch["attention_mask"]) for graph in (dense, slim))
        error, energy = error + float((one - other).square().sum()), energy + float(one.square().sum())
    return float((error / energy) ** 0.5)


@pytest.mark.parametrize("kind", list(CUTS))
@pytest.mark.parametrize("model", ["llama", "qwen2", "opt", "bert"])
def test_heads_are_cut_and_refitted(
    tiny_graph: Any, batches: list[Batch], unseen: Batch, model: str, kind: str
) -> None:
    """Grouped queries, biases, no rotary embedding, an encoder."""
    dense = tiny_graph(model)[1]
    slim = dense.copy()
    swept = Sweep(dense, slim, batches, lambda region, found: apply_map(slim, region, found, False))
    plain = dense.copy()
    unfitted = Sweep(dense, plain, batches, lambda region, found: apply_map(plain, region, found, False), refit=False)
    for layer in (0, 1):
        (region,) = by_kind(dense, kind, layer=layer)
        for one in (swept, unfitted):
            (entry,) = one.slim_sublayer([(region, CUTS[kind])], lambda r: solvers_for("auto", r.kind))
            assert entry.width == CUTS[kind]
            # Scores have no reader to be fitted.
            assert (entry.error is None) == (kind == "query_key" or one is unfitted)
            assert entry.error is None or 0 < entry.error < 1
    slim.refresh_shapes()
    left = {r.width for r in find_regions(slim).of_kind(kind)}
    # One KV head is no longer a width.
    assert left == ({CUTS[kind]} if kind != "kv_heads" else set())
    found = Execution(slim).outputs(unseen)[0]
    assert found.isfinite().all()
    targets = [region.target for region in find_regions(dense).of_kind(kind)]
    refitted, dropped = (stream_error(dense, graph, targets[0], batches) for graph in (slim, plain))
    assert 0 < refitted < 1
    assert refitted == dropped if kind == "query_key" else refitted < dropped


@pytest.mark.parametrize("kind", ["value", "kv_heads"])
@pytest.mark.parametrize("model", ["llama", "qwen2", "bert"])
def test_the_refit_of_heads_is_least_squares_on_what_the_cut_reader_sees(
    tiny_graph: Any, batches: list[Batch], model: str, kind: str
) -> None:
    """From the dense Gram matrix through the map, or from the slim model's own activations: the same reader."""
    dense = tiny_graph(model)[1]
    (region,) = by_kind(dense, kind)
    slim, _ = swept_sublayer(dense, batches, [(region, CUTS[kind])])
    reader = slim.op(region.attention_reader)
    biased = slim.bias(reader) is not None
    sums = GramAccumulator()
    for i, batch in enumerate(batches):
        if i != 7:
            x = token_rows(value_at(slim, reader.inputs[0].name, batch), batch["attention_mask"])
            # The first sublayer: what is wanted is the dense reader's output.
            wanted = token_rows(value_at(dense, region.attention_reader, batch), batch["attention_mask"])
            sums.add(with_ones(x) if biased else x, wanted=wanted)
    expected = refit_reader(sums.gram, sums.cross["wanted"], sums.cross["wanted"], with_bias=biased)
    # float32 activations and weights on one side, their products with a float64 map on the other.
    torch.testing.assert_close(slim.weight(reader).double(), expected.weight, rtol=1e-3, atol=1e-4)
    if expected.bias is not None:
        torch.testing.assert_close(slim.bias(reader).double(), expected.bias, rtol=1e-3, atol=1e-4)


def test_the_values_reader_makes_good_what_scores_lost(tiny_graph: Any, tiny_batch: Any) -> None:
    """At its whole width: the second region of a sublayer sees what the first one cut."""
    dense = tiny_graph("llama")[1]
    # Enough that held-out batches see the gain, which is 2 %.
    batches = [tiny_batch(4, 32, padding=5, seed=seed) for seed in range(25)]
    scores, values = by_kind(dense, "query_key", "value")
    alone, _ = swept_sublayer(dense, batches, [(scores, 4)])
    both, (_, refitted) = swept_sublayer(dense, batches, [(scores, 4), (values, values.width)])
    assert refitted.method == "refit"
    assert stream_error(dense, both, scores.target, batches) < 0.99 * stream_error(dense, alone, scores.target, batches)


def test_attention_and_ffn_that_add_to_one_sum(tiny_graph: Any, batches: list[Batch], unseen: Batch) -> None:
    """Phi: the FFN beside the attention is fitted to what the cut attention leaves over."""
    dense = tiny_graph("phi")[1]
    values, ffn = by_kind(dense, "value", "ffn")
    assert values.target == ffn.target
    alone, _ = swept_sublayer(dense, batches, [(values, 3)])
    repaired, _ = swept_sublayer(dense, batches, [(values, 3), (ffn, WIDTH)])
    target = values.target
    assert stream_error(dense, repaired, target, batches) < 0.97 * stream_error(dense, alone, target, batches)
    both, entries = swept_sublayer(dense, batches, [(values, 3), (ffn, 40)])
    assert [entry.width for entry in entries] == [3, 40]
    assert all(entry.error is not None and 0 < entry.error < 1 for entry in entries)
    assert Execution(both).outputs(unseen)[0].isfinite().all()


def test_of_several_solvers_the_lower_held_out_error_is_taken(tiny_graph: Any, batches: list[Batch]) -> None:
    winners = set()
    for model, width, count in (("llama", 40, 9), ("opt", 32, 9), ("bert", 48, 9), ("llama", 40, 7)):
        dense = tiny_graph(model)[1]
        for layer in (0, 1):
            (region,) = by_kind(dense, "ffn", layer=layer)
            alone = {
                name: swept_sublayer(dense, batches[:count], [(region, width)], only(name))[1][0].error
                for name in ("magnitude", "obs", "dotresize")
            }
            names: list[tuple[str, Solver]] = [(name, SOLVERS[name]) for name in alone]
            _, (found,) = swept_sublayer(dense, batches[:count], [(region, width)], lambda _, names=names: names)
            if count < 8:  # nothing measures: the first
                assert (found.method, found.error) == ("magnitude", None)
                continue
            errors = {name: error for name, error in alone.items() if error is not None}
            assert found.error == pytest.approx(min(errors.values()))
            assert found.method == min(errors, key=errors.__getitem__)
            winners.add(found.method)
    assert len(winners) > 1


@pytest.mark.parametrize("kinds", [("ffn",), ("query_key", "value")])
def test_repair_lowers_the_held_out_error(
    tiny_graph: Any, batches: list[Batch], unseen: Batch, kinds: tuple[str, ...]
) -> None:
    dense = tiny_graph("llama")[1]
    widths = {"ffn": 32, "query_key": 4, "value": 5}
    cuts = [(region, widths[region.kind]) for region in by_kind(dense, *kinds)]
    fast, entries = swept_sublayer(dense, batches, cuts)
    assert all("loss after repair" not in entry.notes for entry in entries)
    best, entries = swept_sublayer(dense, batches, cuts, repair_steps=60)
    notes = entries[-1].notes
    assert float(notes["loss after repair"]) < float(notes["loss before repair"])
    target = cuts[0][0].target
    held_out = [batches[7], unseen]
    assert stream_error(dense, best, target, held_out) < stream_error(dense, fast, target, held_out)
    again, _ = swept_sublayer(dense, batches, cuts, repair_steps=60)
    first, second = best.program.state_dict, again.program.state_dict
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_was_not_cut_is_not_repaired(tiny_graph: Any, batches: list[Batch]) -> None:
    dense = tiny_graph("qwen2")[1]
    (region,) = by_kind(dense, "ffn")
    slim, _ = swept_sublayer(dense, batches, [(region, 32)], repair_steps=20)
    before, after = dense.program.state_dict, slim.program.state_dict
    moved = {name for name in before if name not in after or not torch.equal(before[name], after[name])}
    assert moved == {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
