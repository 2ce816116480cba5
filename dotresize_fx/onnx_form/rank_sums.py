"""What a rank sweep sums over an ONNX graph: nodes that are put in sum it, and no activation is copied out."""

from __future__ import annotations

from collections.abc import Sequence

from dotresize_fx.fidelity import Inputs
from dotresize_fx.gram import GramAccumulator, padding_mask
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.gram_nodes import GramNodes
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.onnx_form.piece import Piece
from dotresize_fx.onnx_form.region_sums import READ, WANTED, Parts, add_to
from dotresize_fx.onnx_form.stream import OnnxStream
from dotresize_fx.rank.rank_sweep import RankCut
from dotresize_fx.sweep import is_held_out

MISSING = "missing"
# What is fed beside the slim graph's own values: what the dense one has there.
_GOAL = "dotresize_fx.goal"


class OnnxRankSums:
    """See :class:`RankSums`. ``sequential`` False calibrates all on the dense graph."""

    def __init__(
        self,
        dense: OnnxGraph,
        slim: OnnxGraph,
        batches: Sequence[Inputs],
        *,
        dense_targets: bool = True,
        sequential: bool = True,
        device: str = "cpu",
    ) -> None:
        self.graph, self.batches, self.device = slim, batches, device
        self.dense_targets, self.sequential = dense_targets, sequential
        masks = [padding_mask(batch) for batch in batches]
        self.dense, self.slim = (
            OnnxStream(execution, [execution.start(batch) for batch in batches], masks)
            for execution in (OnnxExecution(graph, device) for graph in (dense, slim if sequential else dense))
        )

    def reach(self, source: str) -> None:
        """See :meth:`RankSums.reach`."""
        for stream in (self.slim, self.dense) if self.dense_targets else (self.slim,):
            stream.advance(max(stream.position, stream.execution.position(source) + 1))

    def gather(self, cut: RankCut) -> tuple[GramAccumulator, GramAccumulator]:
        """See :meth:`RankSums.gather`. The dense graph's value is fed to the slim one's nodes in the runtime's form."""
        seen = cut.target or cut.op
        goal = self._piece(self.dense, (seen,), [seen], None) if self.dense_targets else None
        wanted: Parts = ((cut.op, 1.0),)
        missing: Parts = ((cut.op, 1.0), (cut.op, -1.0))
        if goal is not None:
            missing = ((_GOAL, 1.0), (seen, -1.0))
            wanted = (*missing, (cut.op, 1.0)) if cut.target else ((_GOAL, 1.0),)
        source = self.graph.op(cut.op).inputs[0].name
        solving, measuring = (
            self._piece(self.slim, (seen, cut.op), [], _nodes(source, name, parts))
            for name, parts in ((MISSING, missing), (WANTED, wanted))
        )
        fitting, held_out = GramAccumulator(), GramAccumulator()
        for i, environment in enumerate(self.slim.environments):
            extra = {} if goal is None else {_GOAL: goal.run(self.dense.environments[i])[0][seen]}
            piece, sums = (measuring, held_out) if is_held_out(i) else (solving, fitting)
            add_to(sums, piece.run(environment, self.slim.masks[i], extra)[1], READ)
        return fitting, held_out

    def edited(self) -> None:
        """See :meth:`RankSums.edited`."""
        if self.sequential:
            self.slim.go_on_in(OnnxExecution(self.graph, self.device), self.batches)

    @staticmethod
    def _piece(stream: OnnxStream, behind: Sequence[str], outputs: Sequence[str], nodes: GramNodes | None) -> Piece:
        stop = 1 + max(stream.execution.position(name) for name in behind)
        return stream.piece(stop, outputs, nodes)


def _nodes(source: str, name: str, parts: Parts) -> GramNodes:
    nodes = GramNodes()
    nodes.add(READ, source, {name: parts}, ones=True)
    return nodes
