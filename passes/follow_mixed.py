"""Follow what an attention mixed on to the linear that reads it."""

from __future__ import annotations

from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.passes.close_dimension import Escape, in_words
from dotresize_fx.passes.follow_heads import FORM, JOINT, Way, follow_gate
from dotresize_fx.passes.head_axes import Shape, is_broadcast, joins, parts_batch, stays, whole


def follow_on(graph: Graph, attention: Op) -> Way:
    """From the attention's result, (batch, heads, length, size), to the linear that reads all heads.

    Of products that are spelled op by op batch and heads may be one axis.

    Raises:
        Escape: with the reason in words.
    """
    return _On(graph, attention).run()


class _On:
    def __init__(self, graph: Graph, attention: Op) -> None:
        self.graph, self.value = graph, attention.output
        shape = self.value.shape
        if attention.attributes.get("merged"):
            heads, width = attention.attributes["sizes"][0], self.value.width
            if width is None or not heads or width % heads:
                raise Escape(FORM)
            self.joint, self.merged, self.axis = False, True, len(shape) - 1
            self.way = Way(attention, heads=heads, size=width // heads)
            return
        self.joint = len(shape) == 3 and not isinstance(shape[0], int)
        if self.value.width is None or not (self.joint or (len(shape) == 4 and isinstance(shape[1], int))):
            raise Escape(FORM)
        self.axis = 0 if self.joint else 1  # of the heads; once they are merged, of all numbers of all heads
        self.merged = False
        heads = 0 if self.joint else shape[1]
        assert isinstance(heads, int)
        self.way = Way(attention, heads=heads, size=self.value.width)

    def run(self) -> Way:
        while True:
            users = [op for op in self.graph.users(self.value) if op.attributes.get("form") != "size"]
            users = [op for op in users if self.value in op.inputs]  # another reads nothing but the shape
            if self.value in self.graph.outputs:
                raise Escape("it is an output of the graph")
            if len(users) != 1:
                raise Escape("several ops read it" if users else "nothing reads it")
            (op,) = users
            if op.kind is Kind.LINEAR and self.merged:
                self.way.linear = op
                return self.way
            if not (stays(op) or self._gated(op) or self._moved(op)):
                raise Escape(in_words(op, "goes into"))
            self.way.crossed.append(op.name)
            self.value = op.output

    def _gated(self, op: Op) -> bool:
        """A factor a head, which is linear in its numbers, or one a number, which keeps them apart."""
        if op.kind is not Kind.MUL or len(op.inputs) != 2 or op.output.shape != self.value.shape or self.joint:
            return False
        (gate,) = (value for value in op.inputs if value != self.value)
        if gate.width == 1 and not self.merged:
            self.way.by_head |= not is_broadcast(gate.shape, len(self.value.shape), self.axis)
            return True
        if gate.shape != self.value.shape:
            return False
        if self.way.gate is not None:
            raise Escape("it is multiplied by two gates")
        self.way.gate = follow_gate(self.graph, op, gate, self.axis, self.way, merged=self.merged)
        return True

    def _moved(self, op: Op) -> bool:
        """Whether the op keeps heads and their numbers apart, or puts them together."""
        form, before, after = op.attributes.get("form"), self.value.shape, op.output.shape
        last = len(before) - 1
        if form == "permute" and not (self.merged or self.joint):
            order = op.attributes["order"]
            self.axis = order.index(self.axis)
            return bool(order[last] == last)
        if form == "where" and not self.joint:
            self.way.by_head |= not is_broadcast(op.inputs[0].shape, last + 1, self.axis)
            return _hides(self.graph, op, self.value)
        return form == "view" and self._view(op.name, before, after)

    def _view(self, name: str, before: Shape, after: Shape) -> bool:
        axis, last = self.axis, len(after) - 1
        if self.joint:
            self.joint, self.axis, self.way.in_place = False, 1, JOINT
            if not parts_batch(after, before):
                return False
            self.way.heads = whole(after[1])
            self.way.of_size.append((name, last))
            return True
        if before == after:
            self._states(name, last if self.merged else axis, last)
            return True
        if not self.merged and axis == len(before) - 2 and joins(before, after, axis):
            self._states(name, axis, axis)
            self.merged = True
            return True
        if self.merged and joins(after, before, axis := len(before) - 1):
            self._states(name, axis, axis + 1)
            self.merged, self.axis = False, axis
            return after[axis:] == (self.way.heads, self.way.size)
        return False

    def _states(self, name: str, heads: int, size: int) -> None:
        self.way.of_heads.append((name, heads))
        self.way.of_size.append((name, size))


def _hides(graph: Graph, op: Op, value: Value) -> bool:
    """Whether a choice between ``value`` and zero is made for whole heads."""
    if len(op.inputs) != 3 or value not in op.inputs[1:]:
        return False
    condition, first, second = op.inputs
    filling = second if first == value else first
    if filling.is_parameter:
        zero = not bool(graph.parameter(filling).any())
    else:
        other = graph.producer(filling)
        zero = other is not None and other.attributes.get("form") == "fill" and other.attributes["number"] == 0
    rank = len(value.shape)
    return zero and is_broadcast(condition.shape, rank, rank - 1)
