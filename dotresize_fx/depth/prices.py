"""What the model loses without one of its blocks: a run of the dense model that passes it by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dotresize_fx.fidelity import Inputs
from dotresize_fx.fx_form.execution import Environment, Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.prices import price_probes
from dotresize_fx.sensitivity import shaping_and_pricing


class DropProbe:
    """A run without the block between two states of the stream."""

    rarely = False

    def __init__(self, name: str, start: torch.fx.Node, first: torch.fx.Node, end: torch.fx.Node) -> None:
        self.name, self.start, self.end = name, start, end
        self.departs = [first]

    def depart(self, execution: Execution, environment: Environment, start: int) -> int:
        """Pass it by; returns where it ends. It is run all the same: later ones may read what is made on the way."""
        before = environment[self.start]
        stop = execution.index[self.end] + 1
        execution.run(environment, start, stop)
        environment[self.end] = before
        return stop


def price_drops(
    graph: FxGraph,
    states: Sequence[tuple[str, str]],
    batches: Sequence[Inputs],
    *,
    task: str = "decoder",
    advanced: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The state that a block ends with -> the loss without it, in the unit of
    :func:`dotresize_fx.sensitivity.measure_curves`; ``states``: what each block starts from and ends with.
    """
    execution = Execution(graph)
    probes = []
    for start, end in states:
        node = graph.node(start)
        first = min((user for user in node.users if user in execution.index), key=execution.position)
        probes.append(DropProbe(end, node, first, graph.node(end)))
    _, pricing = shaping_and_pricing(graph, batches, task)
    return price_probes(graph, probes, pricing, task, advanced)
