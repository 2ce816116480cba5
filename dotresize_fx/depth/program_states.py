"""The stream's states while a program runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dotresize_fx.fidelity import Inputs
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import padding_mask, token_rows


def program_states(
    graph: FxGraph, states: Sequence[str], batches: Sequence[Inputs]
) -> Iterator[Iterator[torch.Tensor]]:
    """By batch the real tokens' rows of each state, one after the other: each batch is to be read to its end."""
    execution = Execution(graph)
    return (_of_batch(execution, states, batch) for batch in batches)


def _of_batch(execution: Execution, states: Sequence[str], batch: Inputs) -> Iterator[torch.Tensor]:
    nodes = [execution.graph.node(name) for name in states]
    stop = max(execution.position(node) for node in nodes) + 1
    mask, environment, position = padding_mask(batch), execution.start(batch), 0
    for node in nodes:
        end = min(stop, max(position, execution.position(node) + 1))
        yield token_rows(execution.run(environment, position, end, keep=[node])[node], mask)
        position = end
