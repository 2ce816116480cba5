"""The sweep on a tiny Llama: exact where nothing is cut, better than dropping where something is, blind to padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dotresize_fx.errors import SolverError
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import GramAccumulator, RegionStatistics, token_rows, with_ones
from dotresize_fx.least_squares import refit_reader
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.fold_linears import FoldLinears
from dotresize_fx.passes.insert_maps import InsertMaps
from dotresize_fx.passes.open_stream import open_stream
from dotresize_fx.region_map import RegionMap, random_rotation
from dotresize_fx.regions import Region
from dotresize_fx.solvers import SOLVERS, Solver, solvers_for
from dotresize_fx.sweep import Solvers, Sweep, SweptRegion

Batch = Mapping[str, torch.Tensor]
WIDTH = 64
# A refit that could be exact is not, by its ridge: 1e-6 of the mean eigenvalue, 1e-5 or less where the activations
# are as little correlated as here.
RIDGE = 1e-5


@dataclass
class Swept:
    """What a sweep left: the slim graph, what was said about each region, and every map that was folded."""

    slim: FxGraph
    regions: list[SweptRegion]
    maps: list[RegionMap]
    seen: list[RegionStatistics]


def sweep(
    dense: FxGraph,
    batches: Sequence[Batch],
    method: str = "dotresize",
    width: int = 40,
    *,
    slim: FxGraph | None = None,
    **options: Any,
) -> Swept:
    """Slim every FFN of ``dense`` (or of ``slim``, against ``dense``) to ``width``."""
    result = Swept(slim or dense.copy(), [], [], [])

    def apply(region: Region, found: RegionMap) -> None:
        result.maps.append(found)
        insert = InsertMaps(region, found)
        insert(result.slim)
        FoldLinears(insert.downs, insert.ups)(result.slim)

    def solve(region: Region, statistics: RegionStatistics, k: int) -> RegionMap:
        result.seen.append(statistics)
        return SOLVERS[method](region, statistics, k)

    regions = list(find_regions(result.slim).of_kind("ffn"))
    swept = Sweep(dense, result.slim, batches, apply, **options)
    for region in regions:
        result.regions += swept.slim_sublayer([(region, width)], lambda _: [(method, solve)])
    return result


@pytest.fixture(scope="module")
def dense(tiny_graph: Callable[[str], tuple[Any, FxGraph]]) -> FxGraph:
    return tiny_graph("llama")[1]


@pytest.fixture(scope="module")
def batches(tiny_batch: Callable[..., Batch]) -> list[Batch]:
    return [tiny_batch(4, 32, padding=5, seed=seed) for seed in range(9)]


@pytest.fixture(scope="module")
def unseen(tiny_batch: Callable[..., Batch]) -> Batch:
    return tiny_batch(8, 32, seed=100)


@pytest.fixture(scope="module")
def error(dense: FxGraph, unseen: Batch) -> Callable[[FxGraph], float]:
    """Root mean square of what changed in the logits, relative to theirs, on tokens the sweep did not see."""
    expected = Execution(dense).outputs(unseen)[0]
    return lambda slim: float((Execution(slim).outputs(unseen)[0] - expected).norm() / expected.norm())


def test_keeping_every_neuron_changes_nothing(
    dense: FxGraph, batches: list[Batch], error: Callable[[FxGraph], float]
) -> None:
    # A selection of all is the identity, and float32 weights times it are themselves.
    assert error(sweep(dense, batches, "magnitude", WIDTH, refit=False).slim) == 0
    refitted = sweep(dense, batches, "magnitude", WIDTH)
    assert error(refitted.slim) <= RIDGE
    # A difference of sums whose float32 products are right to 1e-7 or so, under a root.
    assert all(region.error is not None and region.error <= 1e-3 for region in refitted.regions)


@pytest.mark.parametrize("method", ["magnitude", "dotresize", "obs"])
def test_refitting_against_the_stream_beats_dropping_rows(
    dense: FxGraph, batches: list[Batch], error: Callable[[FxGraph], float], method: str
) -> None:
    dropped = error(sweep(dense, batches, "magnitude", refit=False).slim)
    refitted = error(sweep(dense, batches, method).slim)
    assert refitted < 0.95 * dropped


def test_slims_only_what_it_was_given(dense: FxGraph, batches: list[Batch], text: Callable[[FxGraph], str]) -> None:
    before = text(dense)
    weights = {name: tensor.clone() for name, tensor in dense.program.state_dict.items()}
    swept = sweep(dense, batches[:2])
    assert text(dense) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in dense.program.state_dict.items())
    assert text(swept.slim) == before.replace("[64,32]", "[40,32]").replace("[32,64]", "[32,40]").replace(
        ": 64", ": 40"
    )
    assert [region.width for region in swept.regions] == [40, 40]


def test_every_eighth_batch_measures_and_does_not_solve(
    dense: FxGraph, batches: list[Batch], tiny_batch: Callable[..., Batch]
) -> None:
    assert all(region.error is None for region in sweep(dense, batches[:7]).regions)
    nine = sweep(dense, batches)
    assert all(region.error is not None and 0 < region.error < 1 for region in nine.regions)
    assert nine.seen[0].tokens == 8 * (4 * 32 - 5)
    other = [*batches[:7], tiny_batch(4, 32, padding=5, seed=77), batches[8]]
    assert same_maps(nine, sweep(dense, other))


def test_later_regions_repair_earlier_ones(dense: FxGraph, batches: list[Batch]) -> None:
    """The second FFN keeps its width, and is refitted all the same: against the stream, not its own output."""
    slim = dense.copy()
    first, second = find_regions(dense).of_kind("ffn")
    swept = Sweep(dense, slim, batches, lambda region, found: fold(slim, region, found))
    swept.slim_sublayer([(first, 16)], only("dotresize"))
    unrepaired = slim.copy()
    (refitted,) = swept.slim_sublayer([(second, WIDTH)], only("dotresize"))
    assert (refitted.method, refitted.width) == ("refit", WIDTH)

    def stream_error(slim: FxGraph) -> float:
        """Of the stream behind the second FFN, over the batches that were solved with."""
        errors = []
        for batch in batches[:7]:
            streams = []
            for graph in (dense, slim):
                execution, node = Execution(graph), graph.node(second.target)
                found = execution.run(execution.start(batch), 0, execution.index[node] + 1, keep=[node])[node]
                streams.append(token_rows(found, batch["attention_mask"]))
            errors.append((streams[1] - streams[0]).square().sum() / streams[0].square().sum())
        return float(torch.stack(errors).mean().sqrt())

    assert stream_error(slim) < 0.95 * stream_error(unrepaired)


def only(method: str) -> Callable[[Region], Solvers]:
    """For every region one solver."""
    return lambda region: [(method, SOLVERS[method])]


def fold(graph: FxGraph, region: Region, found: RegionMap) -> None:
    insert = InsertMaps(region, found)
    insert(graph)
    FoldLinears(insert.downs, insert.ups)(graph)


def same_maps(first: Swept, second: Swept) -> bool:
    """Whether all maps are equal to the last bit, refitted readers included."""
    pairs = [
        (a, b)
        for one, other in zip(first.maps, second.maps, strict=True)
        for a, b in [
            (one.down, other.down),
            *zip(one.reader_weights.values(), other.reader_weights.values(), strict=True),
        ]
    ]
    return len(pairs) == 4 and all(torch.equal(a, b) for a, b in pairs)


def test_padding_has_no_influence(dense: FxGraph, batches: list[Batch]) -> None:
    def with_other_ids(batch: Batch, *, padded: bool) -> Batch:
        ids = batch["input_ids"].clone()
        row = ids[0, :5] if padded else ids[0, 5:]
        row.add_(1).remainder_(97)
        return {"input_ids": ids, "attention_mask": batch["attention_mask"]}

    few = batches[:3]
    maps = sweep(dense, few)
    assert same_maps(maps, sweep(dense, [with_other_ids(batch, padded=True) for batch in few]))
    assert not same_maps(maps, sweep(dense, [with_other_ids(batch, padded=False) for batch in few]))


def test_the_same_input_gives_the_same_maps(dense: FxGraph, batches: list[Batch]) -> None:
    assert same_maps(sweep(dense, batches[:3]), sweep(dense, batches[:3]))


def kill(graph: FxGraph, count: int) -> None:
    """Neurons that never fire: rows of the up projection are zero."""
    for region in find_regions(graph).of_kind("ffn"):
        up = graph.op(region.writers[-1])
        weight = graph.weight(up).detach().clone()
        weight[:count] = 0
        graph.set_weight(up, weight)


@pytest.mark.parametrize("dead", [1, 30, 64])
@pytest.mark.parametrize("method", ["magnitude", "dotresize", "obs"])
def test_dead_neurons_give_finite_results(
    dense: FxGraph, batches: list[Batch], unseen: Batch, dead: int, method: str
) -> None:
    graph = dense.copy()
    kill(graph, dead)
    slim = sweep(graph, batches[:3], method).slim
    expected, found = (Execution(g).outputs(unseen)[0] for g in (graph, slim))
    assert torch.isfinite(found).all()
    if dead == 30:  # 34 neurons are alive, 40 are kept: what is left out is silence
        assert float((found - expected).norm() / expected.norm()) <= RIDGE


def test_activations_that_never_change_give_finite_results(dense: FxGraph, unseen: Batch) -> None:
    """One token, all alone, over and over: every Gram matrix has rank one."""
    ids = torch.full((2, 8), 3)
    constant = {"input_ids": ids, "attention_mask": torch.eye(8, dtype=torch.int64)[:2]}
    slim = sweep(dense, [constant]).slim
    assert torch.isfinite(Execution(slim).outputs(unseen)[0]).all()


def test_fewer_tokens_than_neurons_give_finite_results(
    dense: FxGraph, tiny_batch: Callable[..., Batch], unseen: Batch, error: Callable[[FxGraph], float]
) -> None:
    slim = sweep(dense, [tiny_batch(1, 6)]).slim
    assert torch.isfinite(Execution(slim).outputs(unseen)[0]).all()
    assert error(slim) < 1


def test_targets_follow_a_stream_in_another_basis(dense: FxGraph, batches: list[Batch], unseen: Batch) -> None:
    """A slim stream that is the dense one turned: at full width the sweep finds the turned readers again."""
    slim = dense.copy()
    stream, _ = open_stream(slim, next(find_regions(slim).of_kind("residual")))
    turn = random_rotation(32, torch.Generator().manual_seed(0))
    fold(slim, stream, RegionMap(turn, turn.T))
    expected = Execution(dense).outputs(unseen)[0]

    def relative(graph: FxGraph) -> float:
        return float((Execution(graph).outputs(unseen)[0] - expected).norm() / expected.norm())

    turned = sweep(dense, batches, "magnitude", WIDTH, slim=slim.copy(), basis=turn)
    assert relative(turned.slim) <= RIDGE
    forgotten = sweep(dense, batches, "magnitude", WIDTH, slim=slim.copy())
    assert relative(forgotten.slim) > 0.1


def test_activations_that_overflow_are_an_error(tiny_graph: Any, tiny_batch: Any) -> None:
    _, graph = tiny_graph("llama")
    region = next(find_regions(graph).of_kind("ffn"))
    writer = graph.op(region.writers[0])
    graph.set_weight(writer, graph.weight(writer) * float("inf"))
    sweep = Sweep(graph, graph.copy(), [tiny_batch(2, 8)], lambda *_: None)
    with pytest.raises(SolverError, match=r"model\.layers\.0\.mlp: activations .* are infinite or NaN"):
        sweep.slim_sublayer([(region, 32)], only("magnitude"))


# -- the heads of attentions, and sublayers of several regions ---------------------------------------

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
    swept = Sweep(dense, slim, batches, lambda region, found: fold(slim, region, found), **options)
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
    swept = Sweep(dense, slim, batches, lambda region, found: fold(slim, region, found))
    plain = dense.copy()
    unfitted = Sweep(dense, plain, batches, lambda region, found: fold(plain, region, found), refit=False)
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


@pytest.mark.parametrize("model", ["llama", "opt"])
def test_selected_neurons_refit_alike_from_sums_and_from_activations(
    tiny_graph: Any, batches: list[Batch], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tiny_graph(model)[1]
    through = sweep(dense, batches, "obs")
    monkeypatch.setattr("dotresize_fx.sweep._passes_through", lambda region, found: False)
    run_again = sweep(dense, batches, "obs")
    for one, other, here, there in zip(through.maps, run_again.maps, through.regions, run_again.regions, strict=True):
        assert torch.equal(one.down, other.down)
        # The same float32 activations, summed as columns of a larger or of a smaller product.
        for name in one.reader_weights:
            torch.testing.assert_close(one.reader_weights[name], other.reader_weights[name], rtol=1e-3, atol=1e-4)
        for name in one.reader_biases:
            torch.testing.assert_close(one.reader_biases[name], other.reader_biases[name], rtol=1e-3, atol=1e-4)
        assert here.error == pytest.approx(there.error, rel=1e-3)


def test_the_values_reader_makes_good_what_scores_lost(tiny_graph: Any, batches: list[Batch]) -> None:
    """At its whole width: the second region of a sublayer sees what the first one cut."""
    dense = tiny_graph("llama")[1]
    scores, values = by_kind(dense, "query_key", "value")
    alone, _ = swept_sublayer(dense, batches, [(scores, 4)])
    both, (_, refitted) = swept_sublayer(dense, batches, [(scores, 4), (values, values.width)])
    assert refitted.method == "refit"
    assert stream_error(dense, both, scores.target, batches) < 0.98 * stream_error(dense, alone, scores.target, batches)


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


# -- the better of several solvers, and repair -------------------------------------------------------


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
