"""Local repair: the weights of a cut sublayer are refined until the stream behind it is the dense model's again.

Nothing beyond the sublayer is differentiated. The loss is the squared error of the stream relative to the dense
stream's square, token by token, so that the few tokens with massive activations do not drown the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dotresize_fx.fx_form.execution import Environment, Execution
from dotresize_fx.gram import token_rows

# Adam's steps, relative to each weight's mean size: 0.01 to 0.05 made no difference that mattered.
LEARNING_RATE = 0.02
WARM_UP = 20
BETAS = (0.9, 0.95)
# Measurements on held-out batches over the steps, the first before any.
MEASUREMENTS = 4


@dataclass(frozen=True)
class Repaired:
    """``weights`` stand in for the sublayer's own; empty where none measured better on the held-out batches.

    ``before`` and ``after`` are the mean loss on those, per token.
    """

    weights: Mapping[torch.fx.Node, torch.Tensor]
    before: float
    after: float


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
        nodes = execution.nodes[position : execution.index[target] + 1]
        # Scores are sensitive to rounding; products of an FFN are not.
        self.attends = any("attention" in str(node.target) for node in nodes)

    def loss(self, i: int, weights: Mapping[torch.fx.Node, torch.Tensor], *, training: bool) -> torch.Tensor:
        """Mean over batch i's real tokens of |stream - goal|² / |goal|²; float32."""
        device = self.goals[i].device
        half = training and device.type == "cuda" and not self.attends
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            stop = self.execution.index[self.target] + 1
            values = self.execution.run(
                dict(self.environments[i]), self.position, stop, [self.target], weights, gradients=training
            )
        goal = token_rows(self.goals[i], self.masks[i]).float()
        error = token_rows(values[self.target], self.masks[i]).float() - goal
        size = goal.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        # A batch of nothing but padding has no error.
        return (error.square().sum(-1) / size).sum() / max(1, len(goal))


def repair(
    sublayer: Sublayer,
    parameters: Sequence[torch.fx.Node],
    held_out: Sequence[int],
    *,
    steps: int,
    seed: int = 0,
) -> Repaired:
    """Train ``parameters`` for ``steps`` on all batches but the held-out ones, which say what is kept.

    Without held-out batches the last weights are kept if the training batches say that they are better. The same
    seed gives the same weights on one machine.
    """
    execution = sublayer.execution
    weights = {node: execution.parameter(node).detach().clone().requires_grad_() for node in parameters}
    training = [i for i in range(len(sublayer.goals)) if i not in set(held_out)]
    measured = list(held_out) or training
    groups = [{"params": [w], "lr": LEARNING_RATE * float(w.detach().abs().mean())} for w in weights.values()]
    fused = next(iter(weights.values())).is_cuda
    optimizer = torch.optim.Adam(groups, betas=BETAS, fused=fused)
    full = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)

    def measure() -> float:
        return float(torch.stack([sublayer.loss(i, weights, training=False) for i in measured]).mean())

    before = best = measure()
    kept: dict[torch.fx.Node, torch.Tensor] = {}
    order: list[int] = []
    for step in range(steps):
        order = order or torch.randperm(len(training), generator=generator).tolist()
        rate = min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
        for group, lr in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = lr * rate
        optimizer.zero_grad(set_to_none=True)
        sublayer.loss(training[order.pop()], weights, training=True).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) * (MEASUREMENTS - 1) // steps > step * (MEASUREMENTS - 1) // steps:
            now = measure()
            if not math.isfinite(now):
                break
            if now < best:
                best, kept = now, {node: w.detach().clone() for node, w in weights.items()}
    return Repaired(kept, before, best)
