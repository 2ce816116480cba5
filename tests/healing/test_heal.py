"""Healing on tiny models: it gets better and never worse, and is the same every time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from dotresize_fx.errors import UsageError
from dotresize_fx.fidelity import compare_decoders
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.fx_form.trunk import Trunk
from dotresize_fx.graph import Kind
from dotresize_fx.healing import heal
from dotresize_fx.healing.distillation_loss import relative_error
from dotresize_fx.healing.options import HealOptions
from dotresize_fx.passes.find_regions import find_regions

Batch = Mapping[str, torch.Tensor]
TIED = "lm_head.weight"


def test_the_rate_rises_and_falls_to_zero(options: Callable[..., HealOptions]) -> None:
    rate = options(warmup=0.1, learning_rate=1.0).rate
    assert [rate(0.0), rate(0.05), rate(0.1)] == [0.0, 0.5, 1.0]
    assert rate(0.55) == pytest.approx(0.5)
    assert rate(1.0) == rate(2.0) == 0.0


def test_healing_a_cut_model_brings_it_nearer(
    dense: FxGraph,
    slim: FxGraph,
    held_out: list[Batch],
    healed: Callable[..., Any],
    text: Callable[[FxGraph], str],
    same_weights: Callable[..., bool],
) -> None:
    graph, before = slim.copy(), {key: tensor.clone() for key, tensor in slim.program.state_dict.items()}
    found, result = healed()
    assert result.after < 0.8 * result.before
    assert (result.steps, result.stopped) == (24, "steps")
    assert [step for step, _, _ in result.history] == [0, 6, 12, 18, 24]

    def kl(graph: FxGraph) -> float:
        def run(graph: FxGraph) -> Callable[[Batch], torch.Tensor]:
            return lambda batch: Execution(graph).outputs(batch)[0]

        return compare_decoders(run(dense), run(graph), held_out).kl_to_dense

    # Fidelity leaves the last position of a sequence out, which predicts nothing that is there.
    assert kl(slim) == pytest.approx(result.before, rel=0.1)
    assert kl(found) == pytest.approx(result.after, rel=0.1)
    assert text(found) == text(slim)
    assert found.program.state_dict.keys() == before.keys()
    # The copy's tensors are the original's own until they are replaced.
    assert same_weights(slim, graph)
    assert all(torch.equal(tensor, before[key]) for key, tensor in slim.program.state_dict.items())


def test_tied_weights_stay_tied(dense: FxGraph, slim: FxGraph, healed: Callable[..., Any]) -> None:
    found, _ = healed()
    embedding, head = (
        next(op for op in found.ops if op.kind is Kind.EMBEDDING),
        next(op for op in found.ops if op.kind is Kind.LINEAR and op.output in found.outputs),
    )
    assert embedding.weight == head.weight
    assert not torch.equal(found.stored(TIED), slim.stored(TIED))


def test_two_keys_of_one_tensor_stay_one(
    dense: FxGraph, slim: FxGraph, batches: list[Batch], held_out: list[Batch], options: Callable[..., HealOptions]
) -> None:
    def with_two_keys() -> FxGraph:
        graph = slim.copy()
        node = graph.add_parameter("second", graph.stored(TIED))
        graph.program.state_dict["second"] = graph.stored(TIED)
        graph.nodes.output_node().all_input_nodes[0].update_arg(1, node)
        return graph

    one, two = slim.copy(), with_two_keys()
    for graph in (one, two):
        # Unclipped: the norm's last bit hangs on the order of the parameters, and the second key stands first.
        heal(dense, graph, batches, held_out, options(steps=6, clip=1e9))
    assert two.stored("second") is two.stored(TIED)
    assert torch.equal(one.stored(TIED), two.stored(TIED))


def test_a_rate_that_destroys_brings_the_weights_back(slim: FxGraph, healed: Callable[..., Any]) -> None:
    found, result = healed(learning_rate=1.0, patience=2)
    assert result.stopped == "held-out text stopped improving"
    assert result.steps == 12
    assert result.after == result.before
    assert all(found.program.state_dict[key] is tensor for key, tensor in slim.program.state_dict.items())


def test_a_loss_that_breaks_ends_it(
    slim: FxGraph, healed: Callable[..., Any], same_weights: Callable[..., bool]
) -> None:
    found, result = healed(learning_rate=1e36)
    assert result.stopped == "a loss was infinite or NaN"
    assert result.steps < 24
    assert result.after == result.before
    assert same_weights(found, slim)


def test_a_time_budget_ends(healed: Callable[..., Any]) -> None:
    calls: list[None] = []
    _, result = healed(steps=None, seconds=1.5, evaluate_every=None, patience=100, advanced=lambda: calls.append(None))
    assert result.stopped == "time"
    assert 1.5 <= result.seconds < 10
    assert 2 < len(result.history) <= 12
    assert result.after < result.before
    assert 0 < len(calls) <= 100


def test_the_same_seed_gives_the_same_bytes(healed: Callable[..., Any], same_weights: Callable[..., bool]) -> None:
    first, second, other = healed(steps=6)[0], healed(steps=6)[0], healed(steps=6, seed=1)[0]
    assert same_weights(first, second)
    assert not same_weights(first, other)


@pytest.mark.parametrize("steps", [1, 11, 30])
def test_a_budget_of_steps_has_twelve_evaluations_at_most(healed: Callable[..., Any], steps: int) -> None:
    result = healed(steps=steps, evaluate_every=None, patience=100)[1]
    assert min(steps + 1, 10) <= len(result.history) <= 12
    assert result.history[-1][0] == steps
    assert result.notes == ()


def test_padding_has_no_influence(
    batches: list[Batch], healed: Callable[..., Any], same_weights: Callable[..., bool]
) -> None:
    def with_other_ids(batch: Batch, row: slice) -> Batch:
        ids = batch["input_ids"].clone()
        ids[0, row] = (ids[0, row] + 1) % 97
        return {"input_ids": ids, "attention_mask": batch["attention_mask"]}

    plain = healed(steps=4)[0]
    assert same_weights(plain, healed([with_other_ids(batch, slice(0, 5)) for batch in batches], steps=4)[0])
    assert not same_weights(plain, healed([with_other_ids(batch, slice(5, 9)) for batch in batches], steps=4)[0])


@pytest.mark.parametrize("pass_tokens", [32, 1024])
def test_small_passes_add_up_to_the_same_step(healed: Callable[..., Any], pass_tokens: int) -> None:
    plain, other = healed(steps=2)[1], healed(steps=2, pass_tokens=pass_tokens)[1]
    assert other.after == pytest.approx(plain.after, rel=1e-4)


def test_bfloat16_heals_with_padding(healed: Callable[..., Any]) -> None:
    _, result = healed(precision="bfloat16")
    assert result.stopped == "steps"
    assert result.after < 0.8 * result.before


def test_streams_are_part_of_the_loss(
    dense: FxGraph, slim: FxGraph, batches: list[Batch], held_out: list[Batch], healed: Callable[..., Any]
) -> None:
    targets = tuple(region.target for region in find_regions(dense).of_kind("ffn"))

    def streams(graph: FxGraph) -> list[torch.Tensor]:
        trunk = Trunk(graph, targets)
        return trunk({key: graph.stored(key) for key in trunk.keys}, held_out[0])[1]

    def stream_error(graph: FxGraph) -> float:
        pairs = zip(streams(graph), streams(dense), strict=True)
        return sum(float(relative_error(a.flatten(0, 1), b.flatten(0, 1)).detach()) for a, b in pairs)

    without, with_streams = healed()[0], healed(streams=targets, stream_weight=10.0)[0]
    assert stream_error(with_streams) < stream_error(without)
    with pytest.raises(UsageError, match="no_such_stream"):
        healed(streams=("no_such_stream",))


def test_an_encoder_heals(
    tiny_graph: Callable[..., Any],
    tiny_batch: Callable[..., Batch],
    cut: Callable[..., FxGraph],
    options: Callable[..., HealOptions],
) -> None:
    _, dense = tiny_graph("bert")

    def padded(length: int, seed: int) -> Batch:
        batch = tiny_batch(4, length, seed=seed)
        batch["attention_mask"][1, length - 3 :] = 0
        return batch

    data = [padded(length, length) for length in (12, 16, 9, 16, 20)]
    slim = cut(dense, data[:1])
    before = dict(slim.program.state_dict)
    result = heal(dense, slim, data, [padded(14, 99)], options(step_tokens=100), task="encoder")
    assert result.after < 0.8 * result.before
    moved = {key for key, tensor in slim.program.state_dict.items() if tensor is not before[key]}
    # The pooler stands behind the second output, of which the loss knows nothing.
    assert before.keys() - moved <= {"pooler.dense.weight", "pooler.dense.bias"}


def test_bad_arguments_are_said(
    dense: FxGraph, slim: FxGraph, batches: list[Batch], options: Callable[..., HealOptions]
) -> None:
    with pytest.raises(UsageError, match="learning_rate is 0"):
        options(learning_rate=0)
    with pytest.raises(UsageError, match="task"):
        heal(dense, slim.copy(), batches, batches, options(), task="vision")
    with pytest.raises(UsageError, match="at least one batch"):
        heal(dense, slim.copy(), batches, [], options())


def test_a_capped_head_is_run_as_it_is(trace: Callable[..., FxGraph], options: Callable[..., HealOptions]) -> None:
    def forward(module: Any, input_ids: torch.Tensor) -> torch.Tensor:
        return 5 * torch.tanh(module.head(module.table(input_ids)) / 5)

    assert_heals(trace, options, forward, "decoder")


def test_an_output_without_positions_heals(trace: Callable[..., FxGraph], options: Callable[..., HealOptions]) -> None:
    def forward(module: Any, input_ids: torch.Tensor) -> torch.Tensor:
        return module.head(module.table(input_ids).mean(1))

    assert_heals(trace, options, forward, "encoder")


def assert_heals(
    trace: Callable[..., FxGraph], options: Callable[..., HealOptions], forward: Callable[..., torch.Tensor], task: str
) -> None:
    """From another draw of all parameters, on a vocabulary of 20."""
    dense, slim = (
        trace(
            forward, (2, 8), dtype=torch.int64, seed=seed, table=torch.nn.Embedding(20, 8), head=torch.nn.Linear(8, 20)
        )
        for seed in (0, 1)
    )
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(20, (4, 8), generator=generator)} for _ in range(8)]
    result = heal(dense, slim, data[:6], data[6:], options(steps=40, learning_rate=3e-2), task=task)
    assert result.after < 0.5 * result.before
