"""Healing: a short distillation of a slim program from the dense one. Every weight may move, the graph may not."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dotresize_fx.errors import UsageError
from dotresize_fx.fidelity import Inputs
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.healing.batches import Rebatched
from dotresize_fx.healing.captured_step import CapturedStep, EagerStep, StepData
from dotresize_fx.healing.checkpoint import HealCheckpoint, fingerprint
from dotresize_fx.healing.distillation_loss import Distillation
from dotresize_fx.healing.master_weights import MasterWeights
from dotresize_fx.healing.options import PRECISIONS, TASKS, HealOptions, HealResult
from dotresize_fx.ranks import Ranks
from dotresize_fx.repeated_work import CudaRecorder, tf32

# ``advanced`` is called this often over the whole budget.
PROGRESS_STEPS = 100
# Evaluations at most, the first one included, where the options do not say.
EVALUATIONS = 12
BROKEN = "a loss was infinite or NaN"


def heal(
    dense: FxGraph,
    slim: FxGraph,
    batches: Sequence[Inputs],
    held_out: Sequence[Inputs],
    options: HealOptions,
    *,
    task: str = "decoder",
    checkpoint: Path | None = None,
    advanced: Callable[[], None] = lambda: None,
) -> HealResult:
    """Train the slim program's parameters towards the dense program's outputs; the best ones on ``held_out`` stay.

    The state dict's entries are replaced once, at the end, and only by ones with a lower held-out mean: tensors that
    other programs share are not written to, and ones that were shared inside the program stay shared. Buffers and
    constants stay. Where ``torch.distributed`` is initialised every rank calls this with the same arguments.

    Args:
        dense, slim: on one device; batches may lie elsewhere.
        task: "decoder" (the first output is logits) or "encoder".
        checkpoint: a folder, seen by all ranks, for what a later call with the same arguments goes on from.
        advanced: called for each hundredth of the budget. May raise: nothing is changed then.

    Raises:
        UsageError: no batches, an unknown task, a stream that is not in both graphs with one width, or a checkpoint
            of a call with other arguments.
    """
    if task not in TASKS:
        raise UsageError(f"cannot heal a {task!r}: the task is one of {', '.join(TASKS)}")
    device = next(iter(slim.program.state_dict.values())).device
    with tf32(options.tf32 and device.type == "cuda"):
        return _Healing(dense, slim, batches, held_out, options, task, device, checkpoint).run(advanced)


class _Healing:
    def __init__(
        self,
        dense: FxGraph,
        slim: FxGraph,
        batches: Sequence[Inputs],
        held_out: Sequence[Inputs],
        options: HealOptions,
        task: str,
        device: torch.device,
        checkpoint: Path | None,
    ) -> None:
        self.options, self.slim, self.device, self.ranks = options, slim, device, Ranks()
        precision = ("bfloat16" if device.type == "cuda" else "float32") if options.precision == "auto" else None
        self.loss = Distillation(dense, slim, task, options.streams, PRECISIONS[precision or options.precision])
        self.data, self.held_out = Rebatched(batches, device), Rebatched(held_out, device)
        self.weights = MasterWeights(slim, self.loss.slim)
        self.masters = self.weights.masters
        self.ranks.share_first(self.masters)
        self.eager = EagerStep(self.loss, self.weights, self.ranks, options)
        # Where nothing is recorded, Python's launches bound the step, but shapes are free.
        alike = self.ranks.count == 1 and self.data.one_shape
        recorded = options.cuda_graph and alike and device.type == "cuda"
        self.captured = CapturedStep(self.eager, CudaRecorder(device)) if recorded else None
        self.steps, self.stale, self.seconds = 0, 0, 0.0
        self.history: list[tuple[int, float, float]] = []
        self.best: list[torch.Tensor] | None = None
        mark = ""
        if checkpoint is not None:
            words = (repr(options), task, str(dense.nodes), str(slim.nodes), str(self.ranks.count), device.type)
            mark = fingerprint(words, self.weights.named(), batches, held_out)
        self.checkpoint = HealCheckpoint(checkpoint, mark)

    def run(self, advanced: Callable[[], None]) -> HealResult:
        self._resume()
        started, reported = time.perf_counter() - self.seconds, 0
        if not self.history:
            self._evaluate(started)
        orders = self.data.steps(self.options.step_tokens, self.options.seed)
        for chosen in itertools.islice(orders, self.steps, None):
            self.seconds = self._elapsed(started)
            if (stopped := self._why_stop()) is not None:
                break
            self._step(chosen)
            while reported < min(PROGRESS_STEPS, int(PROGRESS_STEPS * self._fraction())):
                reported += 1
                advanced()
            if self._is_due():
                self._evaluate(started)
        if stopped in ("time", "steps") and self.history[-1][0] < self.steps:
            self._evaluate(started)
            stopped = BROKEN if self._is_broken() else stopped
        self.weights.store(self.best)
        after = min(value for _, _, value in self.history if not math.isnan(value)) if self.best else self.history[0][2]
        notes = (self.captured.note,) if self.captured and self.captured.note else ()
        return HealResult(self.steps, self.seconds, self.history[0][2], after, str(stopped), tuple(self.history), notes)

    def _elapsed(self, started: float) -> float:
        """Seconds so far. Ranks have to agree on them only where they decide something."""
        seconds = time.perf_counter() - started
        return seconds if self.options.steps else self.ranks.first(seconds, self.device)

    def _fraction(self) -> float:
        return self.steps / self.options.steps if self.options.steps else self.seconds / self.options.seconds

    def _is_broken(self) -> bool:
        return not math.isfinite(self.history[-1][2])

    def _why_stop(self) -> str | None:
        if self._is_broken():
            return BROKEN
        if self.stale >= self.options.patience:
            return "held-out text stopped improving"
        return ("steps" if self.options.steps else "time") if self._fraction() >= 1 else None

    def _is_due(self) -> bool:
        step, seconds, _ = self.history[-1]
        if self.options.steps:
            return self.steps - step >= (self.options.evaluate_every or self.options.steps / (EVALUATIONS - 1))
        return self.seconds - seconds >= (self.options.evaluate_every or self.options.seconds / (EVALUATIONS - 1))

    def _step(self, chosen: list[int]) -> None:
        mine = chosen[self.ranks.rank :: self.ranks.count]
        passes = tuple(self.data.batches(mine, self.options.pass_tokens))
        outputs, tokens = (torch.full((), 1 / count, device=self.device) for count in self._counts(self.data, chosen))
        # The middle of the step, so that neither the first nor the last is lost to a rate of zero.
        middle = 0.5 / self.options.steps if self.options.steps else 0.0
        (self.captured or self.eager)(StepData(passes, outputs, tokens), self.options.rate(self._fraction() + middle))
        self.steps += 1

    def _counts(self, data: Rebatched, units: Sequence[int]) -> tuple[int, int]:
        """(positions that the first output has, real positions) of units, at least 1."""
        outputs = data.rows if self.loss.slim.dimensions == 2 else data.real
        return max(1, sum(outputs[i] for i in units)), max(1, sum(data.real[i] for i in units))

    @torch.no_grad()
    def _evaluate(self, started: float) -> None:
        """Append to the history and keep what is best; a broken gradient counts as a broken measurement."""
        units, values = range(len(self.held_out)), self.weights.values()
        mine = units[self.ranks.rank :: self.ranks.count]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in self.held_out.batches(mine, self.options.pass_tokens):
            total += self.loss(values, batch)[0]
        mean = self.ranks.sum(total / self._counts(self.held_out, units)[0] + 0 * self.eager.trained).item()
        self.seconds = self._elapsed(started)
        improved = bool(self.history) and mean < min(value for _, _, value in self.history)
        self.history.append((self.steps, self.seconds, mean))
        if self._is_broken():
            return
        if improved:
            self.best = [master.detach().to("cpu", copy=True) for master in self.masters]
        self.stale = 0 if improved or len(self.history) == 1 else self.stale + 1
        self._save()

    def _save(self) -> None:
        if self.checkpoint.file is None or self.ranks.rank != 0:
            return
        tensors: dict[str, torch.Tensor] = {f"{i}.weight": master for i, master in enumerate(self.masters)}
        tensors |= {f"{i}.best": tensor for i, tensor in enumerate(self.best or ())}
        for i, state in self.eager.optimizer.state_dict()["state"].items():
            tensors |= {f"{i}.adam.{name}": tensor for name, tensor in state.items()}
        facts = {"steps": self.steps, "stale": self.stale, "seconds": self.seconds, "history": self.history}
        self.checkpoint.write(tensors, facts)

    @torch.no_grad()
    def _resume(self) -> None:
        found = self.checkpoint.read()
        if found is None:
            return
        tensors, facts = found
        self.steps, self.stale, self.seconds = facts["steps"], facts["stale"], facts["seconds"]
        self.history = [(step, seconds, value) for step, seconds, value in facts["history"]]
        state: dict[int, dict[str, torch.Tensor]] = {}
        for i, master in enumerate(self.masters):
            master.copy_(tensors[f"{i}.weight"])
            prefix = f"{i}.adam."
            moments = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            if moments:
                state[i] = moments
        if "0.best" in tensors:
            self.best = [tensors[f"{i}.best"] for i in range(len(self.masters))]
        self.eager.load(state)
