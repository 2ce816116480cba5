"""Follow a dimension through norms, means and products with parameters: only other orders of its numbers pass these."""

from __future__ import annotations

from dotresize_fx.graph import Graph, Op, Value
from dotresize_fx.passes.close_dimension import NORMS, ClosedDimension, Walk, close, passed_on
from dotresize_fx.passes.follow_places import LAST, size_at


def close_channels(graph: Graph, start: Value) -> ClosedDimension:
    """Everything coupled with the last dimension of ``start`` if its numbers may change their order and nothing else.

    Gains and biases of norms are then among the tables.

    Raises:
        Escape: with the reason in words, when any way leads to an op or an end that is not understood.
    """
    closed = close(_ChannelWalk(graph, start))
    closed.in_order = True
    return closed


class _ChannelWalk(Walk):
    """A norm is one more op between, and a mean or deviation over the width an end: it does not know their order."""

    def check(self, ends: dict[str, list[Op]], normed: set[Value]) -> None:
        pass

    def _starts_normed(self, start: Value) -> bool:
        return False

    def _backwards(self, value: Value) -> None:
        op = self.graph.producer(value)
        if op is not None and op.kind in NORMS and value not in self.places:
            self._norm(op)
        else:
            super()._backwards(value)

    def _into(self, op: Op, value: Value) -> None:
        if value in self.places:
            super()._into(op, value)
        elif op.kind in NORMS and op.inputs[0] == value:
            self._norm(op)
        elif not op.sums_width:
            super()._into(op, value)

    def _norm(self, op: Op) -> None:
        self.ends["norms"].add(op)
        for value in (op.inputs[0], op.output, op.weight, op.bias):
            if value is not None:
                self.join(value, False)

    def join_channels(self, op: Op) -> None:
        for value in op.inputs[1:]:
            self.join(value, False, -len(value.shape))

    def _cross(self, op: Op, normed: bool, place: int = LAST) -> None:
        self.ends["crossed"].add(op)
        self.join(op.output, normed, place)
        for value in passed_on(op):
            if size_at(value, place) not in (1, None):
                self.join(value, normed, place)
