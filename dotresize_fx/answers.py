"""What a model answers on a batch, and what another run of it loses of that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dotresize_fx.fidelity import Inputs, answer_rows, pooled
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.gram import padding_mask, token_rows
from dotresize_fx.graph import Kind
from dotresize_fx.task import predicts_tokens

# No token's chances grow by more than exp of it: beyond float32, and as bad as it gets.
LARGEST = 80.0
# Of a vocabulary so many tokens are scored.
SHORTLIST = 8192


def answer_nodes(execution: Execution, task: str) -> tuple[torch.fx.Node, torch.fx.Node]:
    """What answers are told from, and the model's first output: a decoder's large head is told from what it reads."""
    graph, last = execution.graph, execution.results[0]
    op = graph.op(last.name)
    large = op.kind is Kind.LINEAR and len(graph.weight(op)) > SHORTLIST and graph.bias(op) is None
    return (graph.node(op.inputs[0].name) if large and predicts_tokens(task) else last), last


def answer_width(execution: Execution, task: str) -> int:
    """How many numbers a row of answers has."""
    node, last = answer_nodes(execution, task)
    return SHORTLIST if node is not last else int(last.meta["val"].shape[-1])


class Answers:
    """The dense model's first output on a batch, and what another run of it loses.

    Where a head makes a decoder's answers, ``node`` is what it reads, and only the SHORTLIST tokens that the dense
    model finds likeliest on the batch are scored: the whole head costs a small model more than half of its layers.
    """

    def __init__(
        self, execution: Execution, batch: Inputs, task: str, values: Mapping[torch.fx.Node, Any] | None = None
    ) -> None:
        """``values``: of :func:`answer_nodes`, where they were computed already."""
        self.batch, self.mask, self.task = batch, padding_mask(batch), task
        self.head = None
        self.node, last = answer_nodes(execution, task)
        if values is None:
            values = execution.run(execution.start(batch), 0, execution.index[last] + 1, keep=[self.node, last])
        if self.node is not last:
            likely = token_rows(values[last], self.mask).float().softmax(-1).sum(0).topk(SHORTLIST).indices
            self.head = execution.graph.weight(execution.graph.op(last.name)).index_select(0, likely)
        self.rows = self._rows(values[self.node])
        # An encoder has one answer a sequence.
        self.count = len(self.rows)
        self.chances = self.rows.softmax(-1) if predicts_tokens(task) else self.rows

    def _rows(self, value: torch.Tensor) -> torch.Tensor:
        if self.task == "encoder":  # of nearly equal directions float32 leaves no more than rounding
            return pooled(value, self.batch).double()
        if self.task == "outputs":
            return answer_rows(value, self.mask).double()
        rows = token_rows(value, self.mask)
        return (rows if self.head is None else rows.to(self.head.dtype) @ self.head.T).float()

    def lost(self, value: torch.Tensor) -> float:
        """Sum over tokens of KL(dense || cut); for an encoder over sequences of 1 - cosine of the embeddings, for other
        outputs over their rows of |cut - dense|² / |dense|², the mean row's.

        value: what another run has at ``node``.
        """
        rows = self._rows(value)
        if self.task == "encoder":
            return float((1 - torch.nn.functional.cosine_similarity(self.rows, rows)).clamp_min(0).sum())
        away = rows - self.rows
        if self.task == "outputs":
            size = self.rows.square().sum().clamp_min(torch.finfo(rows.dtype).tiny)
            return float(self.count * away.square().sum() / size)
        # ln of the mean of exp under the dense model's chances, less the mean: exact where the difference is small.
        away -= torch.linalg.vecdot(self.chances, away)[:, None]
        return float(torch.linalg.vecdot(self.chances, away.clamp_max_(LARGEST).expm1_()).log1p().double().sum())
