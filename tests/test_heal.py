"""Healing on tiny models: it gets better and never worse, is the same every time, and goes on after a kill."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dotresize_fx.distillation_loss import divergence, relative_error
from dotresize_fx.errors import UsageError
from dotresize_fx.fidelity import compare_decoders
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.fx_form.trunk import Trunk
from dotresize_fx.graph import Kind
from dotresize_fx.heal import heal
from dotresize_fx.heal_batches import Rebatched
from dotresize_fx.heal_options import HealOptions, HealResult
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.fold_linears import FoldLinears
from dotresize_fx.passes.insert_maps import InsertMaps
from dotresize_fx.solvers import solver
from dotresize_fx.sweep import Sweep

Batch = Mapping[str, torch.Tensor]
TIED = "lm_head.weight"


def options(**changed: Any) -> HealOptions:
    return HealOptions(**{"steps": 24, "step_tokens": 128, "learning_rate": 2e-3, "evaluate_every": 6} | changed)


def cut(dense: FxGraph, batches: list[Batch], width: int = 8) -> FxGraph:
    """Every FFN keeps its neurons of the largest norm; nothing is refitted."""
    slim = dense.copy()

    def apply(region: Any, found: Any) -> None:
        insert = InsertMaps(region, found)
        insert(slim)
        FoldLinears(insert.downs, insert.ups)(slim)

    sweep = Sweep(dense, slim, batches, apply, refit=False)
    for region in find_regions(slim).of_kind("ffn"):
        sweep.slim_region(region, width, solver("magnitude"))
    return slim


def same_weights(first: FxGraph, second: FxGraph) -> bool:
    one, other = first.program.state_dict, second.program.state_dict
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def dense(tiny_graph: Callable[[str], tuple[Any, FxGraph]]) -> FxGraph:
    return tiny_graph("llama")[1]


@pytest.fixture(scope="module")
def batches(tiny_batch: Callable[..., Batch]) -> list[Batch]:
    return [tiny_batch(4, 32, padding=5, seed=seed) for seed in range(32)]


@pytest.fixture(scope="module")
def held_out(tiny_batch: Callable[..., Batch]) -> list[Batch]:
    return [tiny_batch(4, 32, seed=seed) for seed in (100, 101)]


@pytest.fixture(scope="module")
def slim(dense: FxGraph, batches: list[Batch]) -> FxGraph:
    return cut(dense, batches[:2])


@pytest.fixture(scope="module")
def healed(
    dense: FxGraph, slim: FxGraph, batches: list[Batch], held_out: list[Batch]
) -> Callable[..., tuple[FxGraph, HealResult]]:
    """``healed(batches=..., checkpoint=..., **options)``: a healed copy of ``slim``, and what was said about it."""

    def run(given: list[Batch] | None = None, **changed: Any) -> tuple[FxGraph, HealResult]:
        copied = slim.copy()
        rest = {name: changed.pop(name) for name in ("checkpoint", "advanced") if name in changed}
        return copied, heal(dense, copied, given or batches, held_out, options(**changed), **rest)

    return run


# -- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_chunks_give_the_loss_and_gradients_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, head: bool, bias: bool
) -> None:
    monkeypatch.setattr("dotresize_fx.distillation_loss.POSITIONS_AT_ONCE", 7)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    width = 12 if head else 50
    states, dense_states = draw(33, width), draw(33, 16 if head else 50).detach()
    weights = (draw(50, width) if head else None, draw(50) if head and bias else None)
    dense_weights = (draw(50, 16).detach() if head else None, None)
    learned = [part for part in (states, *weights) if part is not None]

    def logits(rows: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        return rows if weight is None else torch.nn.functional.linear(rows, weight, bias)

    q, p = logits(states, *weights).log_softmax(-1), logits(dense_states, *dense_weights).log_softmax(-1)
    plain = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
    chunked = divergence(states, weights, dense_states, dense_weights)
    torch.testing.assert_close(chunked, plain)
    expected = torch.autograd.grad(plain * 0.3, learned)
    torch.testing.assert_close(torch.autograd.grad(chunked * 0.3, learned), expected)


def test_relative_error_is_by_token() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.6, 0.8]])
    assert float(relative_error(expected * torch.tensor([[1.1], [3.0]]), expected)) == pytest.approx(0.01 + 4)
    with pytest.raises(UsageError, match="width was cut"):
        relative_error(expected, expected[:, :1])


def test_a_trunk_and_its_head_are_the_program(dense: FxGraph, held_out: list[Batch]) -> None:
    expected = Execution(dense).outputs(held_out[0])[0]
    for cut_head, bfloat16 in ((True, False), (False, False), (True, True)):
        trunk = Trunk(dense, cut_head=cut_head, bfloat16=bfloat16)
        values = {key: dense.stored(key) for key in trunk.keys}
        states, _ = trunk(values, held_out[0])
        assert (trunk.head is not None) == cut_head
        found = torch.nn.functional.linear(states, values[trunk.head.weight]) if trunk.head else states
        torch.testing.assert_close(found, expected)
    with pytest.raises(UsageError, match="no_such_stream"):
        Trunk(dense, ["no_such_stream"])


def test_position_tables_stay_exact_under_autocast(trace: Callable[..., FxGraph]) -> None:
    def forward(module: Any, x: torch.Tensor) -> torch.Tensor:
        return module.part(x) + x @ torch.full((4, 4), 1.001)

    graph = trace(forward, (2, 4), part=torch.nn.Linear(4, 4))
    trunk = Trunk(graph, bfloat16=True)
    values = {key: torch.zeros_like(graph.stored(key)) if "part" in key else graph.stored(key) for key in trunk.keys}
    x = torch.full((2, 4), 0.2503)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = trunk(values, {graph.program.graph_signature.user_inputs[0]: x})
    torch.testing.assert_close(found, x * 4 * 1.001)


# -- steps -----------------------------------------------------------------------------------------


def test_a_step_takes_its_tokens_and_an_epoch_every_row_once(tiny_batch: Callable[..., Batch]) -> None:
    even = Rebatched([tiny_batch(4, 8, seed=seed) for seed in range(4)], torch.device("cpu"))
    steps = even.steps(32, 0)
    epochs = [[next(steps) for _ in range(4)] for _ in range(2)]
    assert all(sorted(unit for step in epoch for unit in step) == list(range(16)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [len(batch.inputs["input_ids"]) for batch in even.batches(range(7), 24)] == [3, 3, 1]
    ragged = Rebatched([tiny_batch(2, 8), tiny_batch(2, 6, padding=2), tiny_batch(3, 8)], torch.device("cpu"))
    assert ragged.tokens == [16, 12, 24]
    assert ragged.real == [16, 10, 24]
    assert sorted(next(ragged.steps(1000, 0))) == [0, 1, 2]
    assert [tuple(batch.inputs["input_ids"].shape) for batch in ragged.batches([0, 1, 2], 100)] == [(5, 8), (2, 6)]


def test_the_rate_rises_and_falls_to_zero() -> None:
    rate = options(warmup=0.1, learning_rate=1.0).rate
    assert [rate(0.0), rate(0.05), rate(0.1)] == [0.0, 0.5, 1.0]
    assert rate(0.55) == pytest.approx(0.5)
    assert rate(1.0) == rate(2.0) == 0.0


# -- healing ---------------------------------------------------------------------------------------


def test_healing_a_cut_model_brings_it_nearer(
    dense: FxGraph, slim: FxGraph, held_out: list[Batch], healed: Callable[..., Any], text: Callable[[FxGraph], str]
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
    dense: FxGraph, slim: FxGraph, batches: list[Batch], held_out: list[Batch]
) -> None:
    def with_two_keys() -> FxGraph:
        graph = slim.copy()
        node = graph.add_parameter("second", graph.stored(TIED))
        graph.program.state_dict["second"] = graph.stored(TIED)
        graph.nodes.output_node().all_input_nodes[0].update_arg(1, node)
        return graph

    one, two = slim.copy(), with_two_keys()
    for graph in (one, two):
        heal(dense, graph, batches, held_out, options(steps=6))
    assert two.stored("second") is two.stored(TIED)
    assert torch.equal(one.stored(TIED), two.stored(TIED))


def test_a_rate_that_destroys_brings_the_weights_back(slim: FxGraph, healed: Callable[..., Any]) -> None:
    found, result = healed(learning_rate=10.0, patience=2)
    assert result.stopped == "held-out text stopped improving"
    assert result.steps == 12
    assert result.after == result.before
    assert all(found.program.state_dict[key] is tensor for key, tensor in slim.program.state_dict.items())


def test_a_loss_that_breaks_ends_it(slim: FxGraph, healed: Callable[..., Any]) -> None:
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
    assert result.after < result.before
    assert 0 < len(calls) <= 100


def test_the_same_seed_gives_the_same_bytes(healed: Callable[..., Any]) -> None:
    first, second, other = healed(steps=6)[0], healed(steps=6)[0], healed(steps=6, seed=1)[0]
    assert same_weights(first, second)
    assert not same_weights(first, other)


class Killed(Exception):
    pass


def kill_after(calls: int) -> Callable[[], None]:
    left = iter(range(calls))

    def advanced() -> None:
        if next(left, None) is None:
            raise Killed

    return advanced


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, slim: FxGraph, healed: Callable[..., Any]) -> None:
    whole, result = healed()
    with pytest.raises(Killed):
        healed(checkpoint=tmp_path, advanced=kill_after(60))  # between the evaluations at steps 12 and 18
    assert [file.name for file in tmp_path.iterdir()] == ["heal.safetensors"]
    taken: list[None] = []
    resumed, second = healed(checkpoint=tmp_path, advanced=lambda: taken.append(None))
    assert same_weights(resumed, whole)
    assert [(s, kl) for s, _, kl in second.history] == [(s, kl) for s, _, kl in result.history]
    # What is finished is not done again; what was asked for otherwise is not taken for it.
    again, third = healed(checkpoint=tmp_path, advanced=kill_after(0))
    assert same_weights(again, whole)
    assert third.after == result.after
    with pytest.raises(Killed):
        healed(checkpoint=tmp_path, seed=1, advanced=kill_after(0))


def test_a_damaged_checkpoint_is_no_checkpoint(tmp_path: Path, healed: Callable[..., Any]) -> None:
    (tmp_path / "heal.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{]")
    assert same_weights(healed(steps=2, checkpoint=tmp_path)[0], healed(steps=2)[0])


def test_padding_has_no_influence(batches: list[Batch], healed: Callable[..., Any]) -> None:
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


def test_an_encoder_heals(tiny_graph: Callable[..., Any], tiny_batch: Callable[..., Batch]) -> None:
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


def test_bad_arguments_are_said(dense: FxGraph, slim: FxGraph, batches: list[Batch]) -> None:
    with pytest.raises(UsageError, match="learning_rate is 0"):
        options(learning_rate=0)
    with pytest.raises(UsageError, match="task"):
        heal(dense, slim.copy(), batches, batches, options(), task="vision")
    with pytest.raises(UsageError, match="at least one batch"):
        heal(dense, slim.copy(), batches, [], options())


def test_a_capped_head_is_run_as_it_is(trace: Callable[..., FxGraph]) -> None:
    def forward(module: Any, input_ids: torch.Tensor) -> torch.Tensor:
        return 5 * torch.tanh(module.head(module.table(input_ids)) / 5)

    assert_heals(trace, forward, "decoder")


def test_an_output_without_positions_heals(trace: Callable[..., FxGraph]) -> None:
    def forward(module: Any, input_ids: torch.Tensor) -> torch.Tensor:
        return module.head(module.table(input_ids).mean(1))

    assert_heals(trace, forward, "encoder")


def assert_heals(trace: Callable[..., FxGraph], forward: Callable[..., torch.Tensor], task: str) -> None:
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


def test_blocks_share_one_mask(dense: FxGraph) -> None:
    lowest = [node for node in dense.nodes.nodes if torch.finfo(torch.float32).min in node.args]
    trunk = Trunk(dense)
    code = trunk._forward.__self__.code  # type: ignore[attr-defined]
    assert len(lowest) == 2
    assert code.count(str(torch.finfo(torch.float32).min)) == 1


SCRIPT = """
import sys
import torch
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.heal import heal
from dotresize_fx.heal_options import HealOptions

rank, count, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if count > 1:
    torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=count)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50)
    def forward(self, input_ids):
        return self.head(torch.tanh(self.table(input_ids)))

def graph(seed):
    torch.manual_seed(seed)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    return FxGraph(torch.export.export(Model(), (torch.zeros(2, 8, dtype=torch.int64),), dynamic_shapes=shapes))

batches = [{"input_ids": torch.randint(50, (3, 8), generator=torch.Generator().manual_seed(i))} for i in range(5)]
slim = graph(1)
options = HealOptions(steps=9, step_tokens=40, learning_rate=1e-2)
result = heal(graph(0), slim, batches[:4], batches[4:], options)
assert result.after < result.before
from safetensors.torch import save_file
save_file({k: v.detach() for k, v in slim.program.state_dict.items()}, f"{out}/{count}-{rank}.safetensors")
"""


def test_two_processes_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd steps of 5 rows are shared 3 to 2, and every rank ends with what one process alone finds."""
    from safetensors.torch import load_file

    root = Path(__file__).parent.parent
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), "2", str(tmp_path / "store"), str(tmp_path)], cwd=root
        )
        for rank in (0, 1)
    ]
    try:
        monkeypatch.setattr(sys, "argv", ["alone", "0", "1", "", str(tmp_path)])
        exec(SCRIPT, {"__name__": "alone"})
        assert [run.wait(timeout=120) for run in runs] == [0, 0]
    finally:
        for run in runs:
            run.kill()
    first, second, alone = (load_file(tmp_path / f"{name}.safetensors") for name in ("2-0", "2-1", "1-0"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    torch.testing.assert_close(first, alone, rtol=1e-3, atol=1e-4)
