"""Batches cut into rows and put together anew: equally long rows side by side, in an order drawn for every epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dotresize_fx.errors import UsageError
from dotresize_fx.fidelity import Inputs
from dotresize_fx.healing.distillation_loss import Batch


class Rebatched:
    """Units that steps are made of: single rows where all batches have one length, whole batches where they do not.

    Attributes:
        tokens: positions of each unit, padding included: what it costs.
        rows, real: rows of each unit, and its positions that are not padding.
        one_shape: all steps of one size have passes of the same shapes, as long as one process takes them alone.

    Raises:
        UsageError: there are no batches, or one has no real position.
    """

    def __init__(self, batches: Sequence[Inputs], device: torch.device) -> None:
        if not batches:
            raise UsageError("healing needs at least one batch to train on and one that is held out")
        self.one_shape = one_length = len({batch["input_ids"].shape[1] for batch in batches}) == 1
        units = [
            {name: value[i : i + step] for name, value in batch.items()}
            for batch in batches
            for step in [1 if one_length else len(batch["input_ids"])]
            for i in range(0, len(batch["input_ids"]), step)
        ]
        # Padding is counted on the CPU, once, where it costs no wait for the device.
        masks = [unit["attention_mask"] if "attention_mask" in unit else unit["input_ids"] >= 0 for unit in units]
        masks = [mask.cpu().bool() for mask in masks]
        self._units = [{name: value.to(device) for name, value in unit.items()} for unit in units]
        self.rows = [len(mask) for mask in masks]
        self.tokens = [mask.numel() for mask in masks]
        self.real = [int(mask.sum()) for mask in masks]
        # For all or for none, so that passes are alike.
        padded = self.tokens != self.real
        self._padding = [mask.logical_not().flatten().to(device) for mask in masks] if padded else None
        if not sum(self.real):
            raise UsageError("healing batches hold nothing but padding")

    def __len__(self) -> int:
        return len(self._units)

    def steps(self, step_tokens: int, seed: int) -> Iterator[list[int]]:
        """Units of one step after another, for ever: at least ``step_tokens``, or an epoch where that is shorter.

        What is left of an epoch is dropped, and has its chance in the next one's order.
        """
        generator = torch.Generator().manual_seed(seed)
        whole = sum(self.tokens) <= step_tokens
        while True:
            chosen: list[int] = []
            tokens = 0
            for unit in torch.randperm(len(self), generator=generator).tolist():
                chosen.append(unit)
                tokens += self.tokens[unit]
                if tokens >= step_tokens:
                    yield chosen
                    chosen, tokens = [], 0
            if chosen and whole:
                yield chosen

    def batches(self, units: Sequence[int], most_tokens: int) -> Iterator[Batch]:
        """``units`` as forward passes of one length and of ``most_tokens`` positions at most, or of one unit."""
        by_length: dict[int, list[int]] = {}
        for unit in units:
            by_length.setdefault(self.tokens[unit] // self.rows[unit], []).append(unit)
        for same in by_length.values():
            together: list[int] = []
            for unit in same:
                if together and sum(self.tokens[i] for i in [*together, unit]) > most_tokens:
                    yield self._joined(together)
                    together = []
                together.append(unit)
            yield self._joined(together)

    def _joined(self, units: list[int]) -> Batch:
        names = self._units[units[0]]
        inputs = {name: torch.cat([self._units[unit][name] for unit in units]) for name in names}
        return Batch(inputs, None if self._padding is None else torch.cat([self._padding[unit] for unit in units]))
