"""One optimizer step of healing: operation by operation, or as a CUDA graph that is recorded once and replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from dotresize_fx.healing.distillation_loss import Batch, Distillation
from dotresize_fx.healing.master_weights import MasterWeights
from dotresize_fx.healing.options import HealOptions
from dotresize_fx.ranks import Ranks
from dotresize_fx.repeated_work import Recorder, RepeatedWork


class StepData(NamedTuple):
    """This process's share of a step. ``per_output`` and ``per_token`` are float32 scalars on the device: one over the
    positions that the first output has, and over the real positions, of all processes' shares together.
    """

    passes: tuple[Batch, ...]
    per_output: torch.Tensor
    per_token: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it by name."""
        found = {"per_output": self.per_output, "per_token": self.per_token}
        for i, batch in enumerate(self.passes):
            found |= {f"{i}.{name}": tensor for name, tensor in batch.inputs.items()}
            if batch.padding is not None:
                found[f"{i} padding"] = batch.padding
        return found

    def copy(self) -> StepData:
        """The same in memory of its own."""
        passes = (
            Batch(
                {name: tensor.clone() for name, tensor in batch.inputs.items()},
                None if batch.padding is None else batch.padding.clone(),
            )
            for batch in self.passes
        )
        return StepData(tuple(passes), self.per_output.clone(), self.per_token.clone())

    def take(self, other: StepData) -> bool:
        """Overwrite this with ``other``, if all their shapes are the same: whether they are."""
        mine, its = self.tensors(), other.tensors()
        if {name: tensor.shape for name, tensor in mine.items()} != {name: t.shape for name, t in its.items()}:
            return False
        for name, tensor in mine.items():
            tensor.copy_(its[name])
        return True


class EagerStep:
    """A step, operation by operation. Nothing in it waits for the device or depends on what tensors hold.

    Attributes:
        optimizer: AdamW over the masters, whose learning rate is a tensor on their device.
        trained: float32 scalar, the sum of all gradients' norms: not finite once a gradient was not.
    """

    def __init__(self, loss: Distillation, weights: MasterWeights, ranks: Ranks, options: HealOptions) -> None:
        self.loss, self.weights, self.ranks, self.options = loss, weights, ranks, options
        self._rate = torch.zeros((), device=loss.device)
        self.trained = torch.zeros((), device=loss.device)
        self.optimizer = torch.optim.AdamW(
            weights.masters,
            lr=self._rate,
            betas=options.betas,
            weight_decay=options.weight_decay,
            fused=loss.device.type == "cuda",
        )

    def __call__(self, data: StepData, rate: float) -> None:
        """Take the step at this learning rate."""
        self.set_rate(rate)
        self.compute(data)

    def set_rate(self, rate: float) -> None:
        self._rate.fill_(rate)

    def compute(self, data: StepData) -> None:
        """The step at the learning rate that is set; afterwards there are no gradients."""
        masters = self.weights.masters
        # Once a step: what products read is rounded here, and not again by each of them.
        values = self.weights.values()
        for batch in data.passes:
            loss, streams = self.loss(values, batch, measured=False)
            total = loss * data.per_output + streams * (data.per_token * self.options.stream_weight)
            total.backward()  # type: ignore[no-untyped-call]
        self.ranks.sum_gradients(masters)
        self.trained += torch.nn.utils.clip_grad_norm_(masters, self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def load(self, state: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        """Go on from the optimizer's state of before, by the index of the master."""
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate  # loading leaves a copy there

    @contextlib.contextmanager
    def capturable(self) -> Iterator[None]:
        """While it is recorded. The fused optimizer computes the same either way; it only asks to be told."""
        for group in self.optimizer.param_groups:
            group["capturable"] = True
        try:
            yield
        except Exception:
            self.optimizer.zero_grad(set_to_none=True)
            raise
        finally:
            for group in self.optimizer.param_groups:
                group["capturable"] = False


class CapturedStep:
    """Takes steps as its eager twin does, from the first few on by replaying a recording of it.

    Steps of another shape than the first, and all steps once a recording failed, are left to the twin.
    """

    def __init__(self, eager: EagerStep, recorder: Recorder) -> None:
        self._eager = eager
        self._fixed: StepData | None = None
        self._work = RepeatedWork(self._compute, recorder, eager.capturable)

    @property
    def note(self) -> str:
        """Why a recording failed, in one line; "" if none did."""
        return self._work.note

    def __call__(self, data: StepData, rate: float) -> None:
        """Take the step at this learning rate."""
        if self._fixed is None and not self.note:
            self._fixed = data.copy()
        if self._fixed is None or not self._fixed.take(data):
            self._eager(data, rate)
            return
        self._eager.set_rate(rate)
        self._work()
        if self.note:
            self._fixed = None

    def _compute(self) -> None:
        assert self._fixed is not None
        self._eager.compute(self._fixed)
