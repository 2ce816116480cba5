"""How alike the rotary pairs of an ONNX graph turn."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.region_sums import OnnxRegion
from dotresize_fx.onnx_form.runtime_values import from_runtime
from dotresize_fx.rotary_coherence import coherence, turns_of


class RotaryTables:
    """What rotary embeddings read, of the first sequence of a batch; layers with the same tables are asked once.

    ``causal``: whether a query sees earlier keys alone, or all. A graph may say more (windows), which is not read: it
    decides how often a distance counts, and no more.
    """

    def __init__(self, batch: Mapping[str, torch.Tensor], mask: torch.Tensor | None, causal: bool) -> None:
        self._batch, self._mask, self._causal = batch, mask, causal
        self._found: dict[tuple[str, ...], torch.Tensor | None] = {}

    def coherence(self, inputs: OnnxRegion, execution: OnnxExecution) -> torch.Tensor | None:
        """See :func:`rotary_coherence.coherence`; None where nothing is rotated, or tables cannot be told."""
        if len(inputs.tables) != 2 or min(map(execution.position, inputs.tables)) < 0:
            return None
        if inputs.tables not in self._found:
            self._found[inputs.tables] = self._coherence(inputs, execution)
        return self._found[inputs.tables]

    def _coherence(self, inputs: OnnxRegion, execution: OnnxExecution) -> torch.Tensor | None:
        piece = execution.piece(0, 1 + max(map(execution.position, inputs.tables)), inputs.tables)
        values, _ = piece.run(execution.start(self._batch))
        cosine, sine = (from_runtime(values[name]).float() for name in inputs.tables)
        turns = turns_of(cosine, sine, inputs.region.width // 2)
        if turns is None:
            return None
        if self._mask is not None and self._mask.shape[-1] == len(turns):
            turns = turns[self._mask[0].bool().cpu()]
        allowed = torch.ones(len(turns), len(turns), dtype=torch.bool)
        return coherence(turns, allowed.tril() if self._causal else allowed) if len(turns) > 1 else None
