"""What a rank sweep sums while a program runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dotresize_fx.activation_stream import ActivationStream
from dotresize_fx.fidelity import Inputs
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import GramAccumulator, padding_mask, token_rows, with_ones
from dotresize_fx.rank.rank_sweep import RankCut
from dotresize_fx.sweep import is_held_out


class ProgramRankSums:
    """See :class:`RankSums`. ``sequential`` False calibrates all on the dense program."""

    def __init__(
        self,
        dense: FxGraph,
        slim: FxGraph,
        batches: Sequence[Inputs],
        *,
        dense_targets: bool = True,
        sequential: bool = True,
    ) -> None:
        self.graph, self.dense_graph, self.dense_targets = slim, dense, dense_targets
        self.masks = [padding_mask(batch) for batch in batches]
        self.dense, self.slim = (
            ActivationStream(execution := Execution(graph), [execution.start(batch) for batch in batches])
            for graph in (dense, slim if sequential else dense)
        )

    def reach(self, source: str) -> None:
        """See :meth:`RankSums.reach`."""
        for stream in (self.slim, self.dense) if self.dense_targets else (self.slim,):
            position = stream.execution.position(stream.execution.graph.node(source))
            stream.advance(max(stream.position, position + 1))

    def gather(self, cut: RankCut) -> tuple[GramAccumulator, GramAccumulator]:
        """See :meth:`RankSums.gather`."""
        source = self.graph.op(cut.op).inputs[0].name
        fitting, held_out = GramAccumulator(), GramAccumulator()
        for i, (x, wanted) in enumerate(zip(self._read(source), self._wanted(cut, source), strict=True)):
            rows, wanted = with_ones(token_rows(x, self.masks[i])), token_rows(wanted, self.masks[i])
            if is_held_out(i):
                held_out.add(rows, wanted=wanted)
            else:
                fitting.add(rows, missing=wanted - self._applied(self.graph, cut.op, rows[:, :-1]))
        return fitting, held_out

    def edited(self) -> None:
        """The program's weights are looked up when it runs."""

    def _read(self, source: str) -> list[torch.Tensor]:
        node = self.slim.execution.graph.node(source)
        return [environment[node] for environment in self.slim.environments]

    def _wanted(self, cut: RankCut, source: str) -> list[torch.Tensor]:
        """Per batch what the linear should put out."""
        if not self.dense_targets:
            return [self._applied(self.graph, cut.op, x) for x in self._read(source)]
        if cut.target:
            goals, found = self._ahead(self.dense, [cut.target]), self._ahead(self.slim, [cut.target, cut.op])
            # Some models run a sublayer with batch and length joined and part them behind the addition.
            return [(goal - state).reshape_as(out) + out for (goal,), (state, out) in zip(goals, found, strict=True)]
        node = self.dense_graph.node(self.dense_graph.op(cut.op).inputs[0].name)
        return [self._applied(self.dense_graph, cut.op, environment[node]) for environment in self.dense.environments]

    @staticmethod
    def _applied(graph: FxGraph, name: str, x: torch.Tensor) -> torch.Tensor:
        op = graph.op(name)
        weight = graph.weight(op)
        return torch.nn.functional.linear(x.to(weight.dtype), weight, graph.bias(op))

    @staticmethod
    def _ahead(stream: ActivationStream, names: Sequence[str]) -> list[list[torch.Tensor]]:
        """Per batch these values, with the stream left where it is."""
        execution = stream.execution
        nodes = [execution.graph.node(name) for name in names]
        stop = max(execution.position(node) for node in nodes) + 1
        found: list[list[torch.Tensor]] = []
        for environment in stream.environments:
            values: Mapping[torch.fx.Node, torch.Tensor] = execution.run(
                dict(environment), stream.position, stop, keep=nodes
            )
            found.append([values[node] for node in nodes])
        return found
