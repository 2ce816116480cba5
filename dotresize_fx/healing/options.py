"""What healing is asked for, and what it says it did."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dotresize_fx.errors import UsageError

TASKS = ("decoder", "encoder")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class HealOptions:
    """How long and how hard to heal.

    Attributes:
        seconds: the budget, evaluations included; the learning rate ends at zero with it. The last one may overrun.
        steps: this many optimizer steps instead: the same bytes every time on one machine's CPU.
        step_tokens: positions an optimizer step takes at least, over all ranks.
        pass_tokens: positions a forward pass takes at most, unless one sequence is longer.
        learning_rate: AdamW's at its peak, reached after the ``warmup`` share of the budget.
        clip: largest norm of the gradient.
        streams: names of values in both graphs whose relative squared error is added, times ``stream_weight``.
        evaluate_every: seconds, or steps where these are given; if None, there are at most 12 evaluations.
        patience: evaluations in a row without a new best after which it stops.
        precision: "bfloat16" (autocast) or "float32"; "auto" is bfloat16 on CUDA. The loss and weights are float32.
        tf32: let CUDA round the inputs of what products are left in float32, while it heals.
        cuda_graph: let CUDA replay a recording of the step where one process trains on batches of one length.

    Raises:
        UsageError: an option has a value that cannot be used.
    """

    seconds: float = 300.0
    steps: int | None = None
    step_tokens: int = 8192
    pass_tokens: int = 8192
    learning_rate: float = 2e-4
    warmup: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    streams: tuple[str, ...] = ()
    stream_weight: float = 1.0
    evaluate_every: float | None = None
    patience: int = 6
    precision: str = "auto"
    tf32: bool = True
    cuda_graph: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("seconds", "step_tokens", "pass_tokens", "learning_rate", "clip", "patience")
        for name in [*positive, *(name for name in ("steps", "evaluate_every") if getattr(self, name) is not None)]:
            if not getattr(self, name) > 0:
                raise UsageError(f"healing's {name} is {getattr(self, name)}: it must be above 0")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"healing's warmup is {self.warmup}: it must be at least 0 and below 1")
        if self.precision not in ("auto", *PRECISIONS):
            raise UsageError(f"healing's precision is {self.precision}: choose auto, float32 or bfloat16")

    def rate(self, fraction: float) -> float:
        """The learning rate when this share of the budget is spent: a rise, then a cosine down to 0."""
        if fraction < self.warmup:
            return self.learning_rate * fraction / self.warmup
        along = (fraction - self.warmup) / (1 - self.warmup)
        return self.learning_rate * (1 + math.cos(math.pi * min(along, 1.0))) / 2


@dataclass(frozen=True)
class HealResult:
    """What healing did. ``before`` and ``after`` are held-out means a position: KL in nats, or relative error.

    ``stopped`` is "time", "steps", "held-out text stopped improving" or "a loss was infinite or NaN"; ``history``
    has (step, seconds, held-out mean) of every evaluation; ``notes`` are sentences on what did not go as it should.
    """

    steps: int
    seconds: float
    before: float
    after: float
    stopped: str
    history: tuple[tuple[int, float, float], ...]
    notes: tuple[str, ...] = ()
