"""Local repair: the weights of a cut sublayer are refined until the stream behind it is the dense model's again.

Nothing beyond the sublayer is differentiated. The loss is the squared error of the stream relative to the dense
stream's square, token by token, so that the few tokens with massive activations do not drown the rest.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dotresize_fx.fx_form.execution import Environment, Execution
from dotresize_fx.gram import token_rows
from dotresize_fx.offload.lazy_tensor import in_memory
from dotresize_fx.repeated_work import CudaRecorder, RepeatedWork, tf32

# Adam's steps, relative to each weight's mean size: 0.01 to 0.05 made no difference that mattered.
LEARNING_RATE = 0.02
# An encoder's, which takes more steps: on text held out from its calibration half the rate did better.
ENCODER_LEARNING_RATE = 0.01
WARM_UP = 20
BETAS = (0.9, 0.95)
# Measurements on held-out batches over the steps, the first before any.
MEASUREMENTS = 4


@dataclass(frozen=True)
class Repaired:
    """``weights`` stand in for the sublayer's own; empty where none measured better on the held-out batches.

    ``before`` and ``after`` are the mean loss on those, per token. ``note`` says why steps were slow, if they were.
    """

    weights: Mapping[torch.fx.Node, torch.Tensor]
    before: float
    after: float
    note: str = ""


class Sublayer:
    """A piece of a program from a position to ``target``, with the activations that enter it and those it should give.

    environments: one per batch, run up to ``position``; goals: (batch, length, width) or joined, one per batch.
    """

    def __init__(
        self,
        execution: Execution,
        environments: Sequence[Environment],
        position: int,
        target: torch.fx.Node,
        goals: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor | None],
    ) -> None:
        self.execution, self.environments, self.position = execution, environments, position
        self.target, self.goals, self.masks = target, goals, masks
        self.stop = execution.index[target] + 1
        nodes = execution.nodes[position : self.stop]
        # What is read of files for all steps: see :meth:`read_but`.
        self.fixed: Mapping[torch.fx.Node, torch.Tensor] = {}
        # Scores are sensitive to rounding; products of an FFN are not.
        self.attends = any("attention" in str(node.target) for node in nodes)

    def read_but(self, trained: Sequence[torch.fx.Node]) -> None:
        """Read what other parameters stay in files, once for all steps; a recording would hold on to what it reads."""
        self.fixed = self.execution.read_for_good(self.position, self.stop, trained)

    @property
    def alike(self) -> bool:
        """Whether one recording serves all batches: tensors of the same shapes, and no padding to leave out."""
        shapes = [
            ({n: v.shape if isinstance(v, torch.Tensor) else v for n, v in environment.items()}, goal.shape)
            for environment, goal in zip(self.environments, self.goals, strict=True)
        ]
        return all(mask is None for mask in self.masks) and all(shape == shapes[0] for shape in shapes)

    def in_turn(self, numbers: Sequence[int]) -> Iterator[int]:
        """These batches' numbers. What of the next one waits elsewhere is on its way while one is worked at."""
        spool = self.execution.graph.spool
        if spool is None:
            yield from numbers
            return
        for k in spool.in_turn(
            len(numbers), lambda k: (*self.environments[numbers[k]].values(), self.goals[numbers[k]])
        ):
            yield numbers[k]

    def loss(self, i: int, weights: Mapping[torch.fx.Node, torch.Tensor], *, training: bool) -> torch.Tensor:
        """Mean over batch i's real tokens of |stream - goal|² / |goal|²; float32."""
        return self.loss_of(self.environments[i], self.goals[i], self.masks[i], weights, training=training)

    def loss_of(
        self,
        environment: Environment,
        goal: torch.Tensor,
        mask: torch.Tensor | None,
        weights: Mapping[torch.fx.Node, torch.Tensor],
        *,
        training: bool,
    ) -> torch.Tensor:
        """The same of a batch that is given."""
        half = training and goal.is_cuda and not self.attends
        # Without a cache: what a recording casts it has to cast again each time.
        with torch.autocast(goal.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            value = self.put_out(environment, weights, training=training)
        goal = token_rows(goal, mask).float()
        error = token_rows(value, mask).float() - goal
        size = goal.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        # A batch of nothing but padding has no error.
        return (error.square().sum(-1) / size).sum() / max(1, len(goal))

    def put_out(
        self, environment: Environment, weights: Mapping[torch.fx.Node, torch.Tensor], *, training: bool
    ) -> torch.Tensor:
        """What ``target`` puts out with these weights; with gradients when ``training``."""
        given, wanted = {**self.fixed, **weights}, [self.target]
        found = self.execution.run(dict(environment), self.position, self.stop, wanted, given, gradients=training)
        value: torch.Tensor = found[self.target]
        return value


class _Training:
    """Adam on the weights, a batch a step; on CUDA the step is recorded where all batches are alike."""

    def __init__(self, sublayer: Sublayer, weights: Mapping[torch.fx.Node, torch.Tensor], rate: float) -> None:
        self.sublayer, self.weights = sublayer, weights
        self.rates = [rate * float(w.detach().abs().mean()) for w in weights.values()]
        device = sublayer.goals[0].device
        cuda = device.type == "cuda"
        groups = [
            {"params": [w], "lr": torch.tensor(rate, device=device) if cuda else rate}
            for w, rate in zip(weights.values(), self.rates, strict=True)
        ]
        self.optimizer = torch.optim.Adam(groups, betas=BETAS, fused=cuda, capturable=cuda)
        self.recorded: RepeatedWork | None = None
        if cuda and sublayer.alike:
            self.environment = {n: _own(value) for n, value in sublayer.environments[0].items()}
            self.goal = _own(sublayer.goals[0])
            self.recorded = RepeatedWork(lambda: self._step(self.environment, self.goal, None), CudaRecorder(device))

    def step(self, i: int, share: float) -> None:
        """A step on batch i at this share of the full rates."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate * share)
            else:
                group["lr"] = rate * share
        sublayer = self.sublayer
        if self.recorded is None:
            self._step(sublayer.environments[i], sublayer.goals[i], sublayer.masks[i])
            return
        for node, value in sublayer.environments[i].items():
            if isinstance(value, torch.Tensor):
                self.environment[node].copy_(value)
        self.goal.copy_(sublayer.goals[i])
        self.recorded()

    def _step(self, environment: Environment, goal: torch.Tensor, mask: torch.Tensor | None) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with tf32(goal.is_cuda):
            loss = self.sublayer.loss_of(environment, goal, mask, self.weights, training=True)
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def end(self) -> str:
        """Why steps were not recorded, if so. What holds the recording is held by it, activations too."""
        note, self.recorded = self.recorded.note if self.recorded else "", None
        return note


def _own(value: Any) -> Any:
    return in_memory(value).clone() if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def _summed_in_one_order() -> Iterator[None]:
    """Inside, CUDA sums in one order: without, attention's gradients differ from run to run.

    Its fused kernels sum in any order unless torch raises an error on what cannot sum in one, which other ops want not.
    """
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # its setting is one of the module's, which its types do not say
    fills = memory.fill_uninitialized_memory
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False  # every step would write what it then overwrites
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warns)
            memory.fill_uninitialized_memory = fills


@_summed_in_one_order()
def repair(
    sublayer: Sublayer,
    parameters: Sequence[torch.fx.Node],
    held_out: Sequence[int],
    *,
    steps: int,
    rate: float | None = None,
    seed: int = 0,
) -> Repaired:
    """Train ``parameters`` for ``steps`` on all batches but the held-out ones, which say what is kept.

    ``rate`` is Adam's, relative to each weight's mean size; None is LEARNING_RATE.
    Without held-out batches the last weights are kept if the training batches say that they are better. The same
    seed gives the same weights on one machine.
    """
    execution = sublayer.execution
    sublayer.read_but(parameters)
    weights = {node: in_memory(execution.stored(node)).detach().clone().requires_grad_() for node in parameters}
    batches = [i for i in range(len(sublayer.goals)) if i not in set(held_out)]
    measured = list(held_out) or batches
    training = _Training(sublayer, weights, LEARNING_RATE if rate is None else rate)

    def measure() -> float:
        losses = [sublayer.loss(i, weights, training=False) for i in sublayer.in_turn(measured)]
        return float(torch.stack(losses).mean())

    before = best = measure()
    kept: dict[torch.fx.Node, torch.Tensor] = {}
    for step, i in enumerate(sublayer.in_turn(_order(batches, steps, seed))):
        share = min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
        training.step(i, share)
        if (step + 1) * (MEASUREMENTS - 1) // steps > step * (MEASUREMENTS - 1) // steps:
            now = measure()
            if not math.isfinite(now):
                break
            if now < best:
                best, kept = now, {node: w.detach().clone() for node, w in weights.items()}
    return Repaired(kept, before, best, training.end())


def _order(batches: Sequence[int], steps: int, seed: int) -> list[int]:
    """Of each step the batch: all in another order each time round."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while batches and len(order) < steps:
        order += [batches[k] for k in reversed(torch.randperm(len(batches), generator=generator).tolist())]
    return order[:steps]
