"""What a change of one place costs: the dense model is run on with it, and its answers are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dotresize_fx.activation_stream import ActivationStream
from dotresize_fx.fidelity import Inputs, answer_rows, pooled
from dotresize_fx.fx_form.execution import Environment, Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import padding_mask, token_rows
from dotresize_fx.graph import Kind
from dotresize_fx.lazy_tensor import in_memory
from dotresize_fx.ranks import Ranks
from dotresize_fx.task import predicts_tokens

# No token's chances grow by more than exp of it: beyond float32, and as bad as it gets.
LARGEST = 80.0
# Of a vocabulary so many tokens are scored.
SHORTLIST = 8192


class Departure(Protocol):
    """A change of one place. ``departs`` are the nodes that it changes; a run is the dense model's up to the first.
    ``rarely``: it is run on the first batch alone.
    """

    name: str
    rarely: bool

    @property
    def departs(self) -> Sequence[torch.fx.Node]: ...

    def depart(self, execution: Execution, environment: Environment, start: int) -> int:
        """Make the change in ``environment``, which was run up to ``start``; returns how far it is run then."""


@dataclass
class _Departed:
    """A run with a change, on its way to the answers."""

    probe: Departure
    stream: ActivationStream

    def go_on(self, stop: int) -> None:
        if self.stream.position < stop:  # it may have departed to behind it
            self.stream.advance(stop)

    def arrive(self, wanted: torch.fx.Node) -> torch.Tensor:
        execution, (environment,) = self.stream.execution, self.stream.environments
        stop = execution.index[wanted] + 1
        if self.stream.position >= stop:
            found: torch.Tensor = in_memory(environment[wanted])
            return found
        found = execution.run(environment, self.stream.position, stop, keep=[wanted])[wanted]
        return found


def price_probes(
    graph: FxGraph,
    probes: Sequence[Departure],
    batches: Sequence[Inputs],
    task: str,
    advanced: Callable[[], None],
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Loss an answer by name. The dense model is run once more a batch; each probe departs from that run.

    Where weights wait in files all that departed go on side by side, so that each weight is read once a batch.

    Of what rarely goes, and is run on the first batch alone, the loss grows as that of the others does. ``ranks`` share
    the batches.
    """
    ranks = ranks or Ranks(alone=True)
    execution = Execution(graph)
    total = {probe.name: 0.0 for probe in probes}
    always = {probe.name for probe in probes if not probe.rarely} or set(total)
    count, first = 0, 0.0
    departures = [(min(execution.index[node] for node in probe.departs), probe) for probe in probes]
    departures.sort(key=lambda pair: pair[0])
    for i in ranks.mine(len(batches)):
        batch = batches[i]
        answers = Answers(execution, batch, task)
        dense = ActivationStream(execution, [execution.start(batch)])
        departed: list[_Departed] = []
        for start, probe in departures:
            if i > 0 and probe.name not in always:
                continue
            dense.advance(start)
            for one in departed:
                one.go_on(start)
            own = dict(dense.environments[0])  # what waits elsewhere waits there once for all
            departed.append(_Departed(probe, ActivationStream(execution, [own], probe.depart(execution, own, start))))
            if graph.spool is None:
                _arrive(departed, answers, total)
        _arrive(departed, answers, total)
        count += answers.count
        first = first if i else sum(total[name] for name in always)
        advanced()
    if ranks.count > 1:
        device = next(iter(batches[0].values())).device
        *shared, first, counted = ranks.sum(torch.tensor([*total.values(), first, count]).double().to(device)).tolist()
        total, count = dict(zip(total, shared, strict=True)), round(counted)
    growth = sum(total[name] for name in always) / first if first > 0 else 1.0
    return {name: value * (1 if name in always else growth) / max(count, 1) for name, value in total.items()}


def _arrive(departed: list[_Departed], answers: Answers, total: dict[str, float]) -> None:
    """Add what each loses; none is left under way."""
    while departed:
        one = departed.pop(0)
        total[one.probe.name] += answers.lost(one.arrive(answers.node))


def price_graph(dense: FxGraph, other: FxGraph, batches: Sequence[Inputs], task: str) -> float:
    """What a changed copy of ``dense`` loses an answer, in the same unit; its head has to be the dense one's."""
    execution, changed = Execution(dense), Execution(other)
    lost, count = 0.0, 0
    for batch in batches:
        answers = Answers(execution, batch, task)
        node = other.node(answers.node.name)
        values = changed.run(changed.start(batch), 0, changed.index[node] + 1, keep=[node])
        lost, count = lost + answers.lost(values[node]), count + answers.count
    return lost / max(count, 1)


class Answers:
    """The dense model's first output on a batch, and what another run of it loses.

    Where a head makes a decoder's answers, ``node`` is what it reads, and only the SHORTLIST tokens that the dense
    model finds likeliest on the batch are scored: the whole head costs a small model more than half of its layers.
    """

    def __init__(self, execution: Execution, batch: Inputs, task: str) -> None:
        self.batch, self.mask, self.task = batch, padding_mask(batch), task
        self.node, self.head = execution.results[0], None
        graph, last = execution.graph, execution.results[0]
        op = graph.op(last.name)
        large = op.kind is Kind.LINEAR and len(graph.weight(op)) > SHORTLIST and graph.bias(op) is None
        if large and predicts_tokens(task):
            self.node = graph.node(op.inputs[0].name)
        values = execution.run(execution.start(batch), 0, len(execution.nodes), keep=[self.node, last])
        if self.node is not last:
            likely = token_rows(values[last], self.mask).float().softmax(-1).sum(0).topk(SHORTLIST).indices
            self.head = graph.weight(op).index_select(0, likely)
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
