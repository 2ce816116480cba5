"""Follow one of an attention's values back to the linear that writes it, or its result on to the one that reads it.

On the way the axis of the heads and the head's own (always the last) are kept track of. A way with an op that is
not known to keep heads and their width apart is an :class:`~dotresize_fx.passes.close_dimension.Escape`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.passes.close_dimension import Escape, in_words
from dotresize_fx.passes.match_rotary import Rotary, match_rotary

PACKED = "query, key and value are packed in one weight"
INTERLEAVED = "query, key and value are packed in one weight, head by head"
ALL_HEADS_NORM = "a norm acts on all heads together"
Shape = tuple[int | str, ...]


@dataclass
class Way:
    """A way between an attention and a linear; ``linear`` holds ``heads`` heads of ``size`` numbers.

    ``groups`` query heads share one of them where they are repeated on the way. ``of_size`` and ``of_heads`` are
    the (op, axis) whose stated size is a multiple of the head's size and of the number of heads. ``crossed`` are
    all ops between, ``norms`` and ``rotary`` those that stand in the way of a map. ``cache`` are outputs of the graph.
    ``by_head`` says that what stands between is not the same for all heads.
    """

    linear: Op
    heads: int = 0
    size: int = 0
    groups: int = 1
    rotary: Rotary | None = None
    of_size: list[tuple[str, int]] = field(default_factory=list)
    of_heads: list[tuple[str, int]] = field(default_factory=list)
    crossed: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    cache: list[str] = field(default_factory=list)
    by_head: bool = False


def follow_back(graph: Graph, attention: Op, value: Value) -> Way:
    """From an input of the attention, (batch, heads, length, size), to the linear that writes it.

    Raises:
        Escape: with the reason in words.
    """
    return _Back(graph, attention, value).run()


class _Back:
    def __init__(self, graph: Graph, attention: Op, value: Value) -> None:
        if len(value.shape) != 4 or not isinstance(value.shape[1], int) or value.width is None:
            raise Escape("attention acts on it in a form that is not understood")
        self.graph, self.value = graph, value
        self.axis = 1  # of the heads; while they are repeated, of the KV heads, with the query heads on the next
        self.repeated = self.split = False
        self.way = Way(attention, size=value.width)
        self.readers = {attention.name}

    def run(self) -> Way:
        while True:
            op = self._producer()
            if op.kind is Kind.LINEAR:
                if not self.split:
                    raise Escape("it is not split into heads")
                self.way.linear = op
                return self.way
            rotary = None if self.split or self.repeated else match_rotary(self.graph, self.value)
            if rotary is not None:
                self._rotate(rotary)
                continue
            if op.kind in (Kind.RMS_NORM, Kind.LAYER_NORM) and not self.split:
                self.way.norms.append(op.name)
            elif not _passes(op) and (self.split or not self._apart(op)):
                raise Escape(self._refusal(op))
            self.way.crossed.append(op.name)
            self.readers = {op.name}
            self.value = _filled(op)[0] if op.attributes.get("form") == "concat" else op.inputs[0]

    def _producer(self) -> Op:
        """The op that computes the value, which nothing else may read but a cache."""
        op = self.graph.producer(self.value)
        if op is None:
            raise Escape("it comes from an input of the graph")
        for user in self.graph.users(self.value):
            if user.name not in self.readers and user.attributes.get("form") != "size":
                raise Escape(in_words(user, "also goes into"))
        if self.value in self.graph.outputs:
            if op.attributes.get("form") != "concat":
                raise Escape("it is an output of the graph")
            self.way.cache.append(self.value.name)
        return op

    def _rotate(self, rotary: Rotary) -> None:
        if self.way.rotary is not None:
            raise Escape("it is rotated twice")
        self.way.by_head |= not all(is_broadcast(table.shape, 4, self.axis) for table, _ in rotary.tables)
        for name in rotary.ops:
            result = self.graph.op(name).output
            inside = {op.name for op in self.graph.users(result)} <= rotary.ops and result not in self.graph.outputs
            if result != self.value and not inside:
                raise Escape("a part of its rotary embedding is used elsewhere")
        self.way.rotary = rotary
        self.way.crossed += sorted(rotary.ops)
        self.readers, self.value = set(rotary.ops), rotary.source

    def _apart(self, op: Op) -> bool:
        """Whether the op keeps heads and their width apart; the heads' axis is moved to where it is before it."""
        form, attributes = op.attributes.get("form"), op.attributes
        last = len(self.value.shape) - 1
        if form == "concat":
            return attributes["axis"] not in (self.axis, last) and not self.repeated and len(_filled(op)) == 1
        if form == "permute":
            order = attributes["order"]
            beside = not self.repeated or order[self.axis + 1] == order[self.axis] + 1
            kept = beside and order[last] == last
            self.axis = order[self.axis]
            return bool(kept)
        if form == "unsqueeze" and self.repeated and attributes["axis"] == self.axis + 1:
            self.repeated = False
            return True
        before, after = op.inputs[0].shape, self.value.shape
        if form == "expand":
            single = (*after[: self.axis + 1], 1, *after[self.axis + 2 :])
            if before == after or (self.repeated and before == single):
                self._states(op, self.axis, last)
                return True
        return form == "view" and self._view(op, before, after)

    def _view(self, op: Op, before: Shape, after: Shape) -> bool:
        axis, last = self.axis, len(after) - 1
        if before == after and not self.repeated:
            self._states(op, axis, last)
            return True
        if not self.repeated and _joins(before, after, axis) and self.way.groups == 1:
            self._states(op, axis, last)
            self.repeated, self.way.groups = True, _whole(before[axis + 1])
            return True
        if not self.repeated and axis == last - 1 and _joins(after, before, axis):
            self._states(op, axis, last)
            self.split, self.way.heads = True, _whole(after[axis])
            return True
        return False

    def _states(self, op: Op, heads: int, size: int) -> None:
        self.way.of_heads.append((op.name, heads))
        self.way.of_size.append((op.name, size))

    def _refusal(self, op: Op) -> str:
        form = op.attributes.get("form")
        if form in ("part", "split") or (form == "slice" and op.attributes["axis"] == len(self.value.shape) - 1):
            return PACKED if self.split or form == "slice" else INTERLEAVED
        if op.kind in (Kind.RMS_NORM, Kind.LAYER_NORM):
            return ALL_HEADS_NORM
        if op.kind is Kind.ADD or (form == "concat" and op.attributes["axis"] == len(self.value.shape) - 1):
            return "it is combined in a way that is not understood as a rotary embedding of two halves"
        if self.repeated:
            return "KV heads are repeated in an order that is not understood"
        if form == "concat":
            return "it is put behind something that is not an empty cache"
        return "it is reshaped in a way that is not understood" if form == "view" else in_words(op, "comes from")


def follow_on(graph: Graph, attention: Op) -> Way:
    """From the attention's result, (batch, heads, length, size), to the linear that reads all heads.

    Raises:
        Escape: with the reason in words.
    """
    value, axis, merged = attention.output, 1, False
    if len(value.shape) != 4 or not isinstance(value.shape[1], int) or value.width is None:
        raise Escape("attention acts on it in a form that is not understood")
    way = Way(attention, heads=value.shape[1], size=value.width)
    while True:
        users = [op for op in graph.users(value) if op.attributes.get("form") != "size"]
        if value in graph.outputs:
            raise Escape("it is an output of the graph")
        if len(users) != 1:
            raise Escape("several ops read it" if users else "nothing reads it")
        op, last = users[0], len(value.shape) - 1
        form, after = op.attributes.get("form"), op.output.shape
        if op.kind is Kind.LINEAR and merged:
            way.linear = op
            return way
        if _passes(op):
            pass
        elif merged:
            raise Escape(in_words(op, "goes into"))
        elif form == "permute" and op.attributes["order"][last] == last:
            axis = op.attributes["order"].index(axis)
        elif form == "view" and value.shape == after:
            way.of_heads.append((op.name, axis))
            way.of_size.append((op.name, last))
        elif form == "view" and axis == last - 1 and _joins(value.shape, after, axis):
            way.of_heads.append((op.name, axis))
            way.of_size.append((op.name, axis))
            merged = True
        elif form == "where" and _hides(graph, op, value):
            way.by_head |= not is_broadcast(op.inputs[0].shape, last + 1, axis)
        else:
            raise Escape(in_words(op, "goes into"))
        way.crossed.append(op.name)
        value = op.output


def _passes(op: Op) -> bool:
    """A cast, a copy or a factor: every number stays in its place."""
    stays = op.kind in (Kind.KEEP, Kind.SCALE) and op.attributes.get("form") in (None, "slice")
    return stays and op.inputs[0].shape == op.output.shape


def _joins(apart: Shape, joined: Shape, axis: int) -> bool:
    """Whether a reshape from ``apart`` to ``joined`` joins this axis with the next and leaves the others alone."""
    if len(apart) != len(joined) + 1 or len(apart) < axis + 2:
        return False
    outer, inner, whole = apart[axis], apart[axis + 1], joined[axis]
    others = apart[:axis] == joined[:axis] and apart[axis + 2 :] == joined[axis + 1 :]
    if not (isinstance(outer, int) and isinstance(inner, int) and isinstance(whole, int)):
        return False
    return others and outer * inner == whole


def _whole(size: int | str) -> int:
    assert isinstance(size, int)
    return size


def _filled(op: Op) -> list[Value]:
    """What a concatenation puts together, less what is empty, as a cache is at its start."""
    return [value for value in op.inputs if 0 not in value.shape]


def _hides(graph: Graph, op: Op, value: Value) -> bool:
    """Whether a choice between ``value`` and zero is made for whole heads."""
    if len(op.inputs) != 3 or value not in op.inputs[1:]:
        return False
    condition, first, second = op.inputs
    other = graph.producer(second if first == value else first)
    zero = other is not None and other.attributes.get("form") == "fill" and other.attributes["number"] == 0
    rank = len(value.shape)
    return zero and is_broadcast(condition.shape, rank, rank - 1)


def is_broadcast(shape: Shape, rank: int, axis: int) -> bool:
    """Whether a tensor of this shape is the same along an axis of the tensors of this rank it is broadcast to."""
    own = axis - (rank - len(shape))
    return own < 0 or shape[own] == 1
