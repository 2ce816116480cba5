"""The sweep over FFNs: exact where nothing is cut, better than dropping where something is, blind to padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dotresize_fx.errors import SolverError
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import RegionStatistics, token_rows
from dotresize_fx.passes.cut_stream import apply_map
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.open_stream import open_stream
from dotresize_fx.region_map import RegionMap, random_rotation
from dotresize_fx.regions import Region
from dotresize_fx.slim_stream import SlimStream
from dotresize_fx.solvers import SOLVERS
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
        apply_map(result.slim, region, found, False)

    def solve(region: Region, statistics: RegionStatistics, k: int) -> RegionMap:
        result.seen.append(statistics)
        return SOLVERS[method](region, statistics, k)

    regions = list(find_regions(result.slim).of_kind("ffn"))
    swept = Sweep(dense, result.slim, batches, apply, **options)
    for region in regions:
        result.regions += swept.slim_sublayer([(region, width)], lambda _: [(method, solve)])
    return result


def test_a_fit_that_does_not_hold_on_other_tokens_is_not_taken(
    dense: FxGraph, tiny_batch: Callable[..., Batch]
) -> None:
    """An FFN that keeps its width keeps its reader too where 48 tokens are to fit 64 neurons; 2,048 are enough."""
    first, second = find_regions(dense).of_kind("ffn")
    for rows, method in ((1, "kept"), (43, "refit")):
        few = [tiny_batch(rows, 6, seed=seed) for seed in range(9)]
        slim = dense.copy()
        swept = Sweep(dense, slim, few, lambda region, found, slim=slim: apply_map(slim, region, found, False))
        swept.slim_sublayer([(first, 40)], only("obs"))
        before = slim.weight(slim.op(second.readers[0])).clone()
        (entry,) = swept.slim_sublayer([(second, WIDTH)], only("obs"))
        assert (entry.method, entry.width) == (method, WIDTH)
        assert torch.equal(slim.weight(slim.op(second.readers[0])), before) == (method == "kept")


def only(method: str) -> Callable[[Region], Solvers]:
    """For every region one solver."""
    return lambda region: [(method, SOLVERS[method])]


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
    swept = Sweep(dense, slim, batches, lambda region, found: apply_map(slim, region, found, False))
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
    apply_map(slim, stream, RegionMap(turn, turn.T), False)
    expected = Execution(dense).outputs(unseen)[0]

    def relative(graph: FxGraph) -> float:
        return float((Execution(graph).outputs(unseen)[0] - expected).norm() / expected.norm())

    turned = sweep(dense, batches, "magnitude", WIDTH, slim=slim.copy(), stream=SlimStream.of([(stream, turn)]))
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


@pytest.mark.parametrize("model", ["llama", "opt"])
def test_selected_neurons_refit_alike_from_sums_and_from_activations(
    tiny_graph: Any, batches: list[Batch], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tiny_graph(model)[1]
    through = sweep(dense, batches, "obs")
    monkeypatch.setattr(RegionMap, "selected", lambda found, region: None)
    run_again = sweep(dense, batches, "obs")
    for one, other, here, there in zip(through.maps, run_again.maps, through.regions, run_again.regions, strict=True):
        assert torch.equal(one.down, other.down)
        # The same float32 activations, summed as columns of a larger or of a smaller product.
        for name in one.reader_weights:
            torch.testing.assert_close(one.reader_weights[name], other.reader_weights[name], rtol=1e-3, atol=1e-4)
        for name in one.reader_biases:
            torch.testing.assert_close(one.reader_biases[name], other.reader_biases[name], rtol=1e-3, atol=1e-4)
        assert here.error == pytest.approx(there.error, rel=1e-3)


def test_what_both_models_begin_with_is_run_once(
    dense: FxGraph, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same result as where each is run for itself."""
    runs: list[tuple[FxGraph, int]] = []
    run = Execution.run

    def counted(self: Execution, environment: Any, start: int, *rest: Any, **given: Any) -> Any:
        runs.append((self.graph, start))
        return run(self, environment, start, *rest, **given)

    monkeypatch.setattr(Execution, "run", counted)
    once = sweep(dense, batches)
    assert sum(start == 0 for _, start in runs) == len(batches)
    assert {graph for graph, start in runs if start == 0} == {dense}
    monkeypatch.setattr(Execution, "begins_as", lambda *_: False)
    runs.clear()
    each = sweep(dense, batches)
    assert sum(start == 0 for _, start in runs) == 2 * len(batches)
    for name, weight in once.slim.program.state_dict.items():
        assert torch.equal(weight, each.slim.program.state_dict[name])


def test_what_differs_from_the_start_is_run_for_each(dense: FxGraph) -> None:
    """A weight that changed, or a node."""
    changed = dense.copy()
    op = next(op for op in changed.ops if op.is_linear)
    changed.set_weight(op, changed.weight(op).detach() * 2)
    (at,) = [i for i, node in enumerate(Execution(changed).nodes) if node.name == op.name]
    one, other = Execution(dense), Execution(changed)
    assert one.begins_as(Execution(dense.copy()), len(one.nodes))
    assert one.begins_as(other, at)
    assert not one.begins_as(other, at + 1)
