"""Steps on fixed tensors are the steps they stand for, and what cannot be recorded is done all the same."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.healing import HealOptions, heal
from dotresize_fx.healing.batches import Rebatched
from dotresize_fx.healing.captured_step import CapturedStep, EagerStep, StepData
from dotresize_fx.healing.distillation_loss import Distillation
from dotresize_fx.healing.master_weights import MasterWeights
from dotresize_fx.ranks import Ranks
from dotresize_fx.repeated_work import WARM_UP, CudaRecorder, Work

Batch = Mapping[str, torch.Tensor]
RATE = 1e-3


class Steps:
    """An eager step over a copy of ``slim``, and the data of one step after another."""

    def __init__(self, dense: FxGraph, slim: FxGraph, batches: list[Batch], pass_tokens: int = 96) -> None:
        device = next(iter(slim.program.state_dict.values())).device
        loss = Distillation(dense, slim, "decoder", (), torch.bfloat16)
        self.weights = MasterWeights(slim, loss.slim)
        self.eager = EagerStep(loss, self.weights, Ranks(), HealOptions(steps=1))
        self.data, self.pass_tokens = Rebatched(batches, device), pass_tokens
        self.orders = self.data.steps(160, 0)

    def next(self) -> StepData:
        chosen = next(self.orders)
        count = 1 / sum(self.data.real[i] for i in chosen)
        scale = torch.full((), count, device=self.eager.trained.device)
        return StepData(tuple(self.data.batches(chosen, self.pass_tokens)), scale, scale)

    def take(self, step: Callable[[StepData, float], None], count: int) -> list[torch.Tensor]:
        for i in range(count):
            step(self.next(), RATE * (i + 1))
        return [master.detach().clone() for master in self.weights.masters]


class Again:
    """Records by remembering what to do; refuses, half-way through the work, if it was told to."""

    def __init__(self, refuse: bool = False) -> None:
        self.refuse, self.warmed, self.recorded, self.replayed = refuse, 0, 0, 0

    def warm_up(self, work: Work) -> None:
        self.warmed += 1
        work()

    def record(self, work: Work) -> Work:
        self.recorded += 1
        if self.refuse:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


def test_replayed_steps_are_eager_steps(dense: FxGraph, slim: FxGraph, batches: list[Batch]) -> None:
    plain, fixed, again = Steps(dense, slim, batches), Steps(dense, slim, batches), Again()
    expected = plain.take(plain.eager, 6)
    step = CapturedStep(fixed.eager, again)
    found = fixed.take(step, 6)
    assert (again.warmed, again.recorded, again.replayed, step.note) == (WARM_UP, 1, 6 - WARM_UP, "")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(fixed.eager.trained, plain.eager.trained)
    assert float(plain.eager.trained) > 0


def test_what_cannot_be_recorded_is_done_all_the_same(dense: FxGraph, slim: FxGraph, batches: list[Batch]) -> None:
    plain, other, again = Steps(dense, slim, batches), Steps(dense, slim, batches), Again(refuse=True)
    step = CapturedStep(other.eager, again)
    expected, found = plain.take(plain.eager, 6), other.take(step, 6)
    assert again.recorded == 1
    assert step.note == "steps were not recorded as a CUDA graph (RuntimeError: operation not permitted)"
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not other.eager.optimizer.param_groups[0]["capturable"]


def test_a_step_of_another_shape_is_not_replayed(dense: FxGraph, slim: FxGraph, batches: list[Batch]) -> None:
    plain, other, again = Steps(dense, slim, batches), Steps(dense, slim, batches), Again()
    step = CapturedStep(other.eager, again)
    for steps, take in ((plain, plain.eager), (other, step)):
        for i in range(6):
            data = steps.next()
            take(data._replace(passes=data.passes[:1]) if i == 4 else data, RATE)
    assert again.replayed == 5 - WARM_UP
    pairs = zip(plain.weights.masters, other.weights.masters, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "opt"])
def test_nothing_in_a_step_asks_what_tensors_hold(
    tiny_graph: Callable[..., Any], tiny_batch: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Tensors without data cannot tell, so what waits for the device, or has shapes that data decides, fails on them.

    Autocast and the optimizer do not know such tensors, and are left out.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    optimizer = SimpleNamespace(step=lambda: None, zero_grad=lambda **_: None)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *_, **__: optimizer)
    graph = tiny_graph(kind)[1]
    graph.to("meta")
    loss = Distillation(graph, graph.copy(), "decoder", (), None)
    weights = MasterWeights(graph, loss.slim)
    eager = EagerStep(loss, weights, Ranks(), HealOptions(steps=1))
    data = Rebatched([tiny_batch(4, 8, padding=2)], torch.device("meta"))
    scale = torch.ones((), device="meta")
    eager.compute(StepData(tuple(data.batches(range(4), 16)), scale, scale))
    assert all(master.grad is not None for master in weights.masters)


@pytest.mark.gpu
def test_a_cuda_graph_is_the_eager_steps_and_faster(dense: FxGraph, slim: FxGraph, batches: list[Batch]) -> None:
    def on_cuda() -> Steps:
        graphs = dense.copy(), slim.copy()
        for graph in graphs:
            graph.to("cuda")
        return Steps(*graphs, batches)

    plain, fixed = on_cuda(), on_cuda()
    step = CapturedStep(fixed.eager, CudaRecorder(torch.device("cuda")))
    start = [master.detach().clone() for master in plain.weights.masters]
    expected, found = plain.take(plain.eager, 5), fixed.take(step, 5)
    assert step.note == ""
    for a, b, before in zip(found, expected, start, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-3
        assert not torch.equal(b, before)

    def seconds(steps: Steps, take: Callable[[StepData, float], None]) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        steps.take(take, 30)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    assert seconds(fixed, step) < seconds(plain, plain.eager)
    torch.testing.assert_close(fixed.eager.trained, plain.eager.trained, rtol=0.05, atol=0)


@pytest.mark.gpu
def test_what_cuda_refuses_to_record_heals_eagerly(
    dense: FxGraph, slim: FxGraph, batches: list[Batch], held_out: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = dense.copy(), slim.copy()
    for graph in graphs:
        graph.to("cuda")
    compute = EagerStep.compute

    def waits(self: EagerStep, data: StepData) -> None:
        compute(self, data)
        self.trained.item()

    monkeypatch.setattr(EagerStep, "compute", waits)
    result = heal(*graphs, batches, held_out, HealOptions(steps=12, step_tokens=128, learning_rate=2e-3))
    assert result.notes
    assert result.after < result.before
    assert torch.rand(4, device="cuda").isfinite().all()  # the generator was left usable


@pytest.mark.gpu
def test_healing_records_its_steps(dense: FxGraph, slim: FxGraph, batches: list[Batch], held_out: list[Batch]) -> None:
    results = []
    for cuda_graph in (True, False):
        graphs = dense.copy(), slim.copy()
        for graph in graphs:
            graph.to("cuda")
        options = HealOptions(steps=24, step_tokens=128, learning_rate=2e-3, cuda_graph=cuda_graph)
        results.append(heal(*graphs, batches, held_out, options))
    assert results[0].notes == results[1].notes == ()
    assert results[0].after == pytest.approx(results[1].after, rel=0.02)
