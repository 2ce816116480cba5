"""The activations of all calibration batches at one position of an ONNX graph, as ONNX Runtime's own values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.gram_nodes import GramNodes, Sums
from dotresize_fx.onnx_form.piece import Environment, Piece
from dotresize_fx.onnx_form.runtime_values import RuntimeValue


class OnnxStream:
    """The activations of all batches at one position of a graph, brought on piece by piece.

    ``held`` are values that are never dropped. ``masks``: per batch, see :func:`dotresize_fx.gram.padding_mask`.
    """

    def __init__(
        self,
        execution: OnnxExecution,
        environments: Sequence[Environment],
        masks: Sequence[torch.Tensor | None],
        held: Iterable[str] = (),
    ) -> None:
        self.execution, self.masks = execution, masks
        self.environments: Sequence[Environment] = list(environments)
        # The inputs too: what an edit lets later nodes read of earlier ones can then be computed anew.
        self.held = tuple(dict.fromkeys((*execution.inputs, *held)))
        self.position = 0

    def advance(self, stop: int, keep: Sequence[str] = ()) -> list[Environment]:
        """Run to ``stop``; the values of ``keep`` by batch."""
        live = self.execution.live_behind(stop, self.held)
        piece = self.piece(stop, [*live, *keep])
        kept: list[Environment] = []
        environments = list(self.environments)
        self.environments = environments
        for i, environment in enumerate(environments):
            values, _ = piece.run(environment)
            environments[i] = {name: values[name] for name in live}
            kept.append({name: values[name] for name in keep})
        self.position = stop
        return kept

    def go_on_in(self, execution: OnnxExecution, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """From the same position in the edited graph, whose cache may have other heads."""
        self.execution = execution
        for environment, batch in zip(self.environments, batches, strict=True):
            environment.update(execution.empty_cache(batch))

    def piece(
        self,
        stop: int,
        outputs: Iterable[str],
        nodes: GramNodes | None = None,
        overrides: Mapping[str, torch.Tensor] | None = None,
    ) -> Piece:
        """From here to ``stop``, see :meth:`OnnxExecution.piece`."""
        available = self.environments[0] if self.environments else ()
        return self.execution.piece(self.position, stop, outputs, nodes, overrides, available)

    def sums(
        self,
        stop: int,
        nodes: GramNodes,
        outputs: Sequence[str] = (),
        overrides: Mapping[str, torch.Tensor] | None = None,
        extra: Sequence[Mapping[str, RuntimeValue]] | None = None,
    ) -> Iterable[tuple[Environment, Sums]]:
        """Per batch what :meth:`Piece.run` gives of the nodes from here to ``stop``; the stream stays where it is."""
        piece = self.piece(stop, outputs, nodes, overrides)
        for i, environment in enumerate(self.environments):
            yield piece.run(environment, self.masks[i], None if extra is None else extra[i])
