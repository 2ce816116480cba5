"""One model's activations on the calibration text, as far as it was run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dotresize_fx.fx_form.execution import Environment, Execution


@dataclass
class ActivationStream:
    """An environment per batch, run up to ``position``. ``waits``: what is not computed with waits where the graph's
    spool says.
    """

    execution: Execution
    environments: list[Environment]
    position: int = 0
    waits: bool = True

    def advance(self, stop: int) -> None:
        """Run every batch up to the node of this number."""
        for piece in self.execution.pieces(self.position, stop):
            for _, environment in self.in_turn(piece):
                self.execution.run(environment, self.position, piece)
                if self.waits:
                    self.execution.put_away(environment)
            self.position = piece

    def in_turn(self, stop: int, *beside: Sequence[torch.Tensor]) -> Iterator[tuple[int, Environment]]:
        """Each batch's number and environment. What a run up to ``stop`` reads of the next one's, and of what is
        ``beside`` it by batch, is on its way meanwhile.
        """
        spool, numbers = self.execution.graph.spool, range(len(self.environments))
        if spool is None:
            return ((i, self.environments[i]) for i in numbers)
        nodes = self.execution.read_between(self.position, stop)

        def needed(i: int) -> list[torch.Tensor]:
            there = [value for node, value in self.environments[i].items() if node in nodes]
            return [*there, *(values[i] for values in beside)]

        return ((i, self.environments[i]) for i in spool.in_turn(len(numbers), needed))
