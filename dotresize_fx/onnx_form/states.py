"""The stream's states while an ONNX graph runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dotresize_fx.fidelity import Inputs
from dotresize_fx.gram import padding_mask, token_rows
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.onnx_form.runtime_values import from_runtime


def onnx_states(
    graph: OnnxGraph, states: Sequence[str], batches: Sequence[Inputs], device: str = "cpu"
) -> Iterator[list[torch.Tensor]]:
    """By batch the real tokens' rows of each state, float32: outputs of one run of the graph up to the last."""
    execution = OnnxExecution(graph, device)
    stop = 1 + max(execution.position(name) for name in states)
    piece = execution.piece(0, stop, states)
    for batch in batches:
        mask, (values, _) = padding_mask(batch), piece.run(execution.start(batch))
        yield [token_rows(from_runtime(values[name]).float(), mask) for name in states]
