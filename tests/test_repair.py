"""Local repair: held-out loss falls or nothing changes, and only what was named is touched."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dotresize_fx import repair as module
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import padding_mask
from dotresize_fx.offload.lazy_tensor import LazyTensor
from dotresize_fx.offload.stored_tensors import Spool
from dotresize_fx.passes.cut_stream import apply_map
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.regions import Region
from dotresize_fx.repair import Repaired, Sublayer, repair
from dotresize_fx.solvers import solvers_for
from dotresize_fx.sweep import Sweep

Batch = Mapping[str, torch.Tensor]
STEPS = 40


@pytest.fixture(scope="module")
def dense(tiny_graph: Any) -> FxGraph:
    return tiny_graph("llama")[1]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def batches(tiny_batch: Any) -> list[Batch]:
    return [tiny_batch(4, 32, padding=5, seed=seed) for seed in range(10)]


@pytest.fixture(scope="module")
def cut(dense: FxGraph, batches: list[Batch]) -> tuple[FxGraph, Region]:
    """The first FFN cut to 24 of 64, its reader refitted."""
    slim = dense.copy()
    region = next(find_regions(dense).of_kind("ffn"))
    sweep = Sweep(dense, slim, batches, lambda where, found: apply_map(slim, where, found, False))
    sweep.slim_sublayer([(region, 24)], lambda one: solvers_for("obs", one.kind))
    return slim, region


def sublayer(dense: FxGraph, slim: FxGraph, region: Region, batches: list[Batch]) -> Sublayer:
    """Its goals are the dense model's stream."""
    execution, before = Execution(slim), Execution(dense)
    position = min(execution.index[slim.node(name)] for name in region.writers)
    target = dense.node(region.target)
    environments, goals = [execution.start(batch) for batch in batches], []
    for environment, batch in zip(environments, batches, strict=True):
        execution.run(environment, 0, position)
        goals.append(before.run(before.start(batch), 0, before.index[target] + 1, keep=[target])[target])
    masks = [padding_mask(batch) for batch in batches]
    return Sublayer(execution, environments, position, slim.node(region.target), goals, masks)


def parameters(slim: FxGraph, region: Region) -> list[torch.fx.Node]:
    ops = [slim.op(name) for name in (*region.writers, *region.readers)]
    return [slim.node(op.weight.name) for op in ops if op.weight is not None]


def repaired(dense: FxGraph, cut: tuple[FxGraph, Region], batches: list[Batch], **options: Any) -> Repaired:
    slim, region = cut
    chosen: dict[str, Any] = {"held_out": [7, 8], "steps": STEPS, **options}
    held_out = chosen.pop("held_out")
    return repair(sublayer(dense, slim, region, batches), parameters(slim, region), held_out, **chosen)


def test_the_held_out_loss_falls(dense: FxGraph, cut: tuple[FxGraph, Region], batches: list[Batch]) -> None:
    found = repaired(dense, cut, batches)
    assert found.after < 0.97 * found.before
    # What is said is what these weights give.
    piece = sublayer(dense, *cut, batches)
    assert piece.loss(7, found.weights, training=False) + piece.loss(8, found.weights, training=False) == (
        pytest.approx(2 * found.after, rel=1e-5)
    )


@pytest.mark.parametrize(("steps", "rate"), [(1, 1e4), (3, 1e4), (12, 1e30), (5, 30.0)])
def test_it_never_makes_things_worse(
    dense: FxGraph,
    cut: tuple[FxGraph, Region],
    batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    rate: float,
) -> None:
    monkeypatch.setattr(module, "LEARNING_RATE", rate)
    monkeypatch.setattr(module, "WARM_UP", 1)
    found = repaired(dense, cut, batches, steps=steps)
    assert found.weights == {}
    assert found.after == found.before


def test_without_held_out_batches_the_training_ones_say(
    dense: FxGraph, cut: tuple[FxGraph, Region], batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = repaired(dense, cut, batches[:2], held_out=[])
    assert found.after < found.before
    monkeypatch.setattr(module, "LEARNING_RATE", 1e4)
    assert repaired(dense, cut, batches[:2], held_out=[]).weights == {}


def same(one: Repaired, other: Repaired) -> bool:
    names = [{node.name: weight for node, weight in found.weights.items()} for found in (one, other)]
    assert names[0].keys() == names[1].keys() != set()
    return all(torch.equal(names[0][name], names[1][name]) for name in names[0])


def test_a_seed_gives_the_same_bytes(dense: FxGraph, cut: tuple[FxGraph, Region], batches: list[Batch]) -> None:
    first = repaired(dense, cut, batches, seed=3)
    assert same(first, repaired(dense, cut, batches, seed=3))
    assert not same(first, repaired(dense, cut, batches, seed=4))


def test_the_rate_is_how_far_a_step_goes(dense: FxGraph, cut: tuple[FxGraph, Region], batches: list[Batch]) -> None:
    usual = repaired(dense, cut, batches)
    assert same(usual, repaired(dense, cut, batches, rate=module.LEARNING_RATE))
    assert not same(usual, repaired(dense, cut, batches, rate=module.ENCODER_LEARNING_RATE))


def test_padding_has_no_influence(dense: FxGraph, cut: tuple[FxGraph, Region], batches: list[Batch]) -> None:
    first = repaired(dense, cut, batches)
    for padded in (True, False):
        others = []
        for batch in batches:
            ids = batch["input_ids"].clone()
            row = ids[0, :5] if padded else ids[0, 5:]
            row.add_(1).remainder_(97)
            others.append({**batch, "input_ids": ids})
        assert same(first, repaired(dense, cut, others)) == padded


def test_only_what_was_named_is_trained(dense: FxGraph, cut: tuple[FxGraph, Region], batches: list[Batch]) -> None:
    """And the program itself keeps its weights: the result stands beside them."""
    slim, region = cut
    before = {name: tensor.clone() for name, tensor in slim.program.state_dict.items()}
    named = parameters(slim, region)[:1]
    found = repair(sublayer(dense, slim, region, batches), named, [7], steps=STEPS)
    assert list(found.weights) == named
    assert all(torch.equal(tensor, before[name]) for name, tensor in slim.program.state_dict.items())
    assert not any(weight.requires_grad for weight in found.weights.values())


def test_what_stays_in_files_is_read_once(
    dense: FxGraph, cut: tuple[FxGraph, Region], batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the steps, and a large weight too, of which a run alone would read a part at a time."""
    slim, region = cut[0].copy(), cut[1]
    monkeypatch.setattr("dotresize_fx.fx_form.stored_parameters.PIECE", 1)
    named = parameters(slim, region)[:1]
    expected = repair(sublayer(dense, slim, region, batches), named, [7], steps=5)
    reads: list[str] = []
    for op in (slim.op(name) for name in (*region.writers, *region.readers)):
        assert op.weight is not None
        if op.weight.name == named[0].name:
            continue
        key, weight = slim.parameter_name(op.weight), slim.weight(op)

        def read(key: str = key, weight: torch.Tensor = weight) -> torch.Tensor:
            reads.append(key)
            return weight

        slim.program.state_dict[key] = torch.nn.Parameter(LazyTensor(read, tuple(weight.shape), weight.dtype), False)
    piece = sublayer(dense, slim, region, batches)
    reads.clear()
    assert same(repair(piece, named, [7], steps=5), expected)
    assert len(reads) == len(set(reads)) == 2


def test_held_out_batches_do_not_train(
    dense: FxGraph, cut: tuple[FxGraph, Region], batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured once, at the end: after a step on each batch, what the held-out one holds does not matter."""
    monkeypatch.setattr(module, "MEASUREMENTS", 2)
    first, second = (
        repaired(dense, cut, [*batches[:7], other], held_out=[7], steps=8) for other in (batches[7], batches[8])
    )
    assert same(first, second)
    assert first.before != second.before


def test_the_loss_is_relative_token_by_token(dense: FxGraph, cut: tuple[FxGraph, Region], batches: list[Batch]) -> None:
    piece = sublayer(dense, *cut, batches[:1])
    (goal,), real = piece.goals, batches[0]["attention_mask"].bool()
    execution, target = piece.execution, piece.target
    stop = execution.index[target] + 1
    value = execution.run(dict(piece.environments[0]), piece.position, stop, keep=[target])[target]
    errors = (value - goal)[real].square().sum(-1) / goal[real].square().sum(-1)
    assert float(piece.loss(0, {}, training=False)) == pytest.approx(float(errors.mean()), rel=1e-5)
    # A token a hundred times as large counts like any other.
    piece.goals[0][1, 3] *= 100
    assert float(piece.loss(0, {}, training=False)) < float(errors.mean()) + 1 / int(real.sum())


def waiting(piece: Sublayer, folder: Path, streams: str) -> Sublayer:
    """The same one, whose activations wait there."""
    piece.execution.graph.spool = spool = Spool(folder, streams=streams)
    for environment in piece.environments:
        piece.execution.put_away(environment)
    piece.goals = [spool.put_activation(goal) for goal in piece.goals]
    return piece


def test_batches_come_in_turn(
    dense: FxGraph, cut: tuple[FxGraph, Region], batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the steps in one go, and between them those that measure; what they hold is asked for ahead."""
    slim, region = cut[0].copy(), cut[1]
    named = parameters(slim, region)
    expected = repair(sublayer(dense, slim, region, batches), named, [7, 8], steps=12)
    piece = waiting(sublayer(dense, slim, region, batches), tmp_path, "files")
    asked: list[list[int]] = []
    goals = {id(goal): i for i, goal in enumerate(piece.goals)}

    def in_turn(count: int, needed: Callable[[int], Iterable[torch.Tensor]]) -> Iterator[int]:
        asked.append([goals[id(value)] for k in range(count) for value in needed(k) if id(value) in goals])
        yield from range(count)

    assert slim.spool is not None
    monkeypatch.setattr(slim.spool, "in_turn", in_turn)
    assert same(repair(piece, named, [7, 8], steps=12), expected)
    steps = next(order for order in asked if len(order) == 12)
    assert sorted(steps[:8]) == [0, 1, 2, 3, 4, 5, 6, 9]
    assert [order for order in asked if order is not steps] == [[7, 8]] * module.MEASUREMENTS


@pytest.mark.gpu
def test_activations_that_wait_in_pinned_memory(
    dense: FxGraph, cut: tuple[FxGraph, Region], tiny_batch: Any, tmp_path: Path
) -> None:
    """The same weights, from recorded steps, where batches are copied beside the step before."""
    graphs = dense.copy(), cut[0].copy()
    for graph in graphs:
        graph.to("cuda")
    batches = [{k: v.cuda() for k, v in tiny_batch(4, 32, seed=seed).items()} for seed in range(10)]
    piece = sublayer(graphs[0], graphs[1], cut[1], batches)
    assert piece.alike
    named = parameters(graphs[1], cut[1])
    expected = repair(piece, named, [7, 8], steps=STEPS)
    assert same(repair(waiting(piece, tmp_path, "pinned"), named, [7, 8], steps=STEPS), expected)


@pytest.mark.gpu
def test_nothing_is_left_of_recorded_steps(dense: FxGraph, cut: tuple[FxGraph, Region], tiny_batch: Any) -> None:
    """Without a look for cycles: a sublayer's activations are most of the memory that there is."""
    graphs = dense.copy(), cut[0].copy()
    for graph in graphs:
        graph.to("cuda")
    batches = [{k: v.cuda() for k, v in tiny_batch(4, 32, seed=seed).items()} for seed in range(10)]
    piece = sublayer(graphs[0], graphs[1], cut[1], batches)
    gc.collect()
    gc.disable()
    try:
        repair(piece, parameters(graphs[1], cut[1]), [7, 8], steps=STEPS)
        left = weakref.ref(piece)
        del piece
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.gpu
def test_recorded_steps_are_the_same_steps(dense: FxGraph, cut: tuple[FxGraph, Region], tiny_batch: Any) -> None:
    """One of the batches is padded, then none is: nothing but rounding tells the two ways apart."""
    graphs = dense.copy(), cut[0].copy()
    for graph in graphs:
        graph.to("cuda")
    found = []
    for alike in (True, False):
        batches = [{k: v.cuda() for k, v in tiny_batch(4, 32, seed=seed).items()} for seed in range(10)]
        piece = sublayer(graphs[0], graphs[1], cut[1], batches)
        assert piece.alike
        if not alike:
            piece.masks[0] = torch.ones(4, 32, dtype=torch.bool, device="cuda")
        found.append(repair(piece, parameters(graphs[1], cut[1]), [7, 8], steps=STEPS))
        assert found[-1].note == ""
        assert found[-1].after < 0.97 * found[-1].before
    assert found[0].after == pytest.approx(found[1].after, rel=0.01)  # bfloat16
