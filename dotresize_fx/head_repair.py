"""Repair of what stands in front of a head whose table is tied: judged by the answers, not by what it puts out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dotresize_fx.activation_stream import ActivationStream
from dotresize_fx.fx_form.execution import Environment
from dotresize_fx.gram import token_rows
from dotresize_fx.healing.distillation_loss import Weights, divergence
from dotresize_fx.repair import Sublayer


class HeadEntrance(Sublayer):
    """From a slim stream's position to ``target``, which a head of weights ``narrow`` reads.

    goals: what the dense head of weights ``wide`` reads, (batch, length, d), one per batch. The loss is the KL of the
    next token's distribution from the dense model's, a mean over real tokens, in nats.
    """

    def __init__(
        self,
        stream: ActivationStream,
        target: torch.fx.Node,
        goals: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor | None],
        narrow: Weights,
        wide: Weights,
    ) -> None:
        super().__init__(stream.execution, stream.environments, stream.position, target, goals, masks)
        self.narrow, self.wide = narrow, wide

    def loss_of(
        self,
        environment: Environment,
        goal: torch.Tensor,
        mask: torch.Tensor | None,
        weights: Mapping[torch.fx.Node, torch.Tensor],
        *,
        training: bool,
    ) -> torch.Tensor:
        half = training and goal.is_cuda
        with torch.autocast(goal.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            value = self.put_out(environment, weights, training=training)
            rows, expected = token_rows(value, mask), token_rows(goal, mask)
            with torch.set_grad_enabled(training):
                total = divergence(rows, self.narrow, expected, self.wide, measured=not training)
        return total / max(1, len(rows))
