"""One model's activations on the calibration text, as far as it was run."""

from __future__ import annotations

from dataclasses import dataclass

from dotresize_fx.fx_form.execution import Environment, Execution


@dataclass
class ActivationStream:
    """An environment per batch, run up to ``position``."""

    execution: Execution
    environments: list[Environment]
    position: int = 0

    def advance(self, stop: int) -> None:
        """Run every batch up to the node of this number."""
        for piece in self.execution.pieces(self.position, stop):
            for environment in self.environments:
                self.execution.run(environment, self.position, piece)
                for node, value in environment.items():
                    environment[node] = self.execution.graph.kept_activation(value)
            self.position = piece
