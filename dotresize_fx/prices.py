"""What a change of one place costs: the dense model is run on with it, and its answers are compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dotresize_fx.activation_stream import ActivationStream
from dotresize_fx.answers import Answers, answer_nodes, answer_width
from dotresize_fx.cost import stream_width
from dotresize_fx.fidelity import Inputs
from dotresize_fx.fx_form.execution import Environment, Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.offload.lazy_tensor import in_memory
from dotresize_fx.ranks import Ranks

# Bytes of departed runs that may go on side by side on a device.
SIDE_BY_SIDE = 4 << 30


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
    """Runs with a change, on their way to the answers; ``numbers`` say of which of the batches side by side."""

    probe: Departure
    numbers: list[int]
    stream: ActivationStream

    def arrive(self, wanted: torch.fx.Node) -> Iterator[tuple[int, torch.Tensor]]:
        execution, start = self.stream.execution, self.stream.position
        stop = execution.index[wanted] + 1
        for number, environment in zip(self.numbers, self.stream.environments, strict=True):
            if start >= stop:
                yield number, in_memory(environment[wanted])
            else:
                yield number, execution.run(environment, start, stop, keep=[wanted])[wanted]


def price_probes(
    graph: FxGraph,
    probes: Sequence[Departure],
    batches: Sequence[Inputs],
    task: str,
    advanced: Callable[[], None],
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Loss an answer by name. The dense model is run once more a batch; each probe departs from that run.

    Where weights wait in files all that departed go on side by side, and batches too, so that each weight is read once
    for as many as there is room for; where there is room for some of them alone, the dense model is run again.

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
    at_once, together = _side_by_side(execution, len(probes), batches, task)
    mine = ranks.mine(len(batches))
    for numbers in (mine[i : i + at_once] for i in range(0, len(mine), at_once)):
        chosen = [(start, probe) for start, probe in departures if 0 in numbers or probe.name in always]
        counted = 0
        for some in (chosen[i : i + together] for i in range(0, len(chosen), together)):
            lost = _run_on(execution, some, always, batches, numbers, task)
            for name, of_batches in lost.by_probe.items():
                total[name] += sum(of_batches.values())
                if 0 in numbers and name in always:
                    first += of_batches[numbers.index(0)]
            counted = lost.count
        count += counted
        for _ in numbers:
            advanced()
    if ranks.count > 1:
        device = next(iter(batches[0].values())).device
        *shared, first, counted = ranks.sum(torch.tensor([*total.values(), first, count]).double().to(device)).tolist()
        total, count = dict(zip(total, shared, strict=True)), round(counted)
    growth = sum(total[name] for name in always) / first if first > 0 else 1.0
    return {name: value * (1 if name in always else growth) / max(count, 1) for name, value in total.items()}


def _run_on(
    execution: Execution,
    departures: Sequence[tuple[int, Departure]],
    always: Collection[str],
    batches: Sequence[Inputs],
    numbers: Sequence[int],
    task: str,
) -> _Lost:
    """What these lose, each with where it departs, in that order, on the batches of these numbers; of these one that is
    not to run ``always`` takes the first alone.
    """
    in_memory_too = execution.graph.spool is None
    lost = _Lost(execution, [batches[i] for i in numbers], task, at_once=in_memory_too)
    dense = lost.dense
    departed: list[_Departed] = []
    for start, probe in departures:
        chosen = [k for k, i in enumerate(numbers) if i == 0 or probe.name in always]
        dense.advance(start)
        _go_on(departed, execution, start)
        own = [dict(dense.environments[k]) for k in chosen]  # what waits elsewhere waits there once for all
        stop = max(probe.depart(execution, environment, start) for environment in own)
        departed.append(_Departed(probe, chosen, ActivationStream(execution, own, stop, waits=dense.waits)))
        if in_memory_too:
            lost.add(departed)
    lost.add(departed)
    return lost


def _go_on(departed: Sequence[_Departed], execution: Execution, stop: int) -> None:
    """Run all up to it, or to where near it they hold least: many wait there."""
    if departed:
        near = execution.narrowest(0, stop)
        for one in departed:
            if one.stream.position < near:  # they may have departed to behind it
                one.stream.advance(near)


def _side_by_side(execution: Execution, probes: int, batches: Sequence[Inputs], task: str) -> tuple[int, int]:
    """How many batches and how many probes go on together: more than one batch where weights wait in files and nothing
    else does; there no more probes than there is room for.
    """
    graph = execution.graph
    if graph.spool is None or graph.spool.streams == "files" or not probes:
        return 1, max(1, probes)
    answers = 2 * answer_width(execution, task)
    room, width = SIDE_BY_SIDE // (4 * max(map(graph.expected_rows, batches))), stream_width(graph)
    at_once = room // (width * (probes + 1) + answers)
    return (at_once, probes) if at_once else (1, max(1, (room - answers) // width - 1))


class _Lost:
    """What departed runs lose of the dense model's answers on some batches. ``at_once``: the answers are computed
    before any run departs, not when the dense model's own run arrives.
    """

    def __init__(self, execution: Execution, batches: Sequence[Inputs], task: str, *, at_once: bool) -> None:
        self.by_probe: dict[str, dict[int, float]] = defaultdict(dict)
        self._batches, self._task = batches, task
        spool = execution.graph.spool
        waits = spool is not None and spool.streams == "files"
        self.dense = ActivationStream(execution, [execution.start(batch) for batch in batches], waits=waits)
        self._answers = [Answers(execution, batch, task) for batch in batches] if at_once else []

    @property
    def count(self) -> int:
        """Of answers."""
        return sum(answers.count for answers in self._answers)

    def add(self, departed: list[_Departed]) -> None:
        """What each loses; none is left under way."""
        execution = self.dense.execution
        if not self._answers:
            node, last = answer_nodes(execution, self._task)
            *before, _ = execution.pieces(self.dense.position, execution.index[node] + 1)
            for piece in before:
                self.dense.advance(piece)
                _go_on(departed, execution, piece)
            for batch, environment in zip(self._batches, self.dense.environments, strict=True):
                values = execution.run(environment, self.dense.position, execution.index[last] + 1, keep=[node, last])
                self._answers.append(Answers(execution, batch, self._task, values))
                environment.clear()  # of the answers themselves
        while departed:
            one = departed.pop(0)
            for number, value in one.arrive(self._answers[0].node):
                self.by_probe[one.probe.name][number] = self._answers[number].lost(value)


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
