"""Follow one of an attention's values, or the gate of its result, back to the linear that writes it.

On the way the axis of the heads and the head's own (always the last) are kept track of. A way with an op that is
not known to keep heads and their width apart is an :class:`~dotresize_fx.passes.close_dimension.Escape`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.passes.close_dimension import Escape, in_words
from dotresize_fx.passes.head_axes import Shape, added, is_broadcast, joins, parts_batch, squeezed, stays, whole
from dotresize_fx.passes.match_rotary import Rotary, match_rotary

PACKED = "query, key and value are packed in one weight"
INTERLEAVED = "query, key and value are packed in one weight, head by head"
ALL_HEADS_NORM = "a norm acts on all heads together"
JOINT = "its heads and the batch are one axis"
COUNTED_TWICE = "its heads are counted in groups"
FORM = "attention acts on it in a form that is not understood"


@dataclass
class Way:
    """A way between an attention and a linear; ``linear`` holds ``heads`` heads of ``size`` numbers.

    ``groups`` query heads share one of them where they are repeated on the way. ``of_size`` and ``of_heads`` are
    the (op, axis) whose stated size is a multiple of the head's size and of the number of heads. ``crossed`` are
    all ops between, ``norms`` and ``rotary`` those that stand in the way of a map. ``cache`` are outputs of the graph.
    ``by_head`` says that what stands between is not the same for all heads, ``in_place`` why whole heads have to stay
    where they are. ``gate`` is the way to the linear whose function multiplies an attention's result number by number.
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
    in_place: str = ""
    gate: Way | None = None


def follow_back(graph: Graph, attention: Op, value: Value, *, turned: bool = False, heads: int = 0) -> Way:
    """From an input of the attention, (batch, heads, length, size), to the linear that writes it.

    Of products that are spelled op by op batch and heads may be one axis. ``turned``: the last two are exchanged.
    With ``heads`` it is (batch, length, heads times size).

    Raises:
        Escape: with the reason in words.
    """
    if heads:
        if value.width is None or value.width % heads:
            raise Escape(FORM)
        back = _Back(graph, attention, value, 1, size=value.width // heads)
        back.split, back.way.heads = True, heads
        return back.run()
    joint = len(value.shape) == 3 and not isinstance(value.shape[0], int)
    if (len(value.shape) != 4 or not isinstance(value.shape[1], int)) and not joint:
        raise Escape(FORM)
    back = _Back(graph, attention, value, 0 if joint else 1, size=value.shape[-2 if turned else -1])
    back.joint, back.turned = joint, turned
    return back.run()


def follow_gate(graph: Graph, product: Op, value: Value, axis: int, result: Way, *, merged: bool) -> Way:
    """From the factor ``value`` of an attention's result, shaped as that, to the linear it is a function of.

    The heads lie on ``axis``, with ``merged`` heads and their numbers together.

    Raises:
        Escape: with the reason in words.
    """
    back = _Back(graph, product, value, axis, size=value.width)
    back.is_gate, back.split = True, merged
    back.way.heads, back.way.size = result.heads, result.size
    try:
        way = back.run()
    except Escape as escape:
        raise Escape(f"it is multiplied by a gate that is not understood: {escape.reason}") from None
    if (way.heads, way.groups) != (result.heads, 1):
        raise Escape("it is multiplied by a gate with heads of its own")
    if way.norms:
        raise Escape("it is multiplied by a gate that a norm acts on")
    return way


class _Back:
    def __init__(self, graph: Graph, reader: Op, value: Value, axis: int, size: int | str | None) -> None:
        if not isinstance(size, int):
            raise Escape(FORM)
        self.graph, self.value = graph, value
        self.axis = axis  # of the heads; while they are repeated, of the KV heads, with the query heads on the next
        self.repeated = self.split = self.joint = self.is_gate = False
        self.turned = False  # whether the numbers of a head lie on the last axis but one
        self.way = Way(reader, size=size)
        self.readers = {reader.name}

    def run(self) -> Way:
        while True:
            op = self._producer()
            if op.kind is Kind.LINEAR:
                if not self.split:
                    raise Escape("it is not split into heads")
                self.way.linear = op
                return self.way
            if self.turned and not (stays(op) or op.attributes.get("form") == "permute"):
                raise Escape(FORM)
            plain = not (self.split or self.repeated or self.joint or self.is_gate or self.turned)
            plain |= bool(op.attributes.get("rotary")) and not self.is_gate
            rotary = match_rotary(self.graph, self.value) if plain else None
            if rotary is not None:
                self._rotate(rotary)
                continue
            if op.kind in (Kind.RMS_NORM, Kind.LAYER_NORM) and not self.split:
                self.way.norms.append(op.name)
            elif not (stays(op) or self._of_gate(op)) and not (self._parted(op) if self.split else self._apart(op)):
                raise Escape(self._refusal(op))
            self.way.crossed.append(op.name)
            self.readers = {op.name}
            self.value = added(self.graph, op)[0] if op.attributes.get("form") == "concat" else op.inputs[0]

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
        if rotary.halves:
            self.way.by_head |= not all(is_broadcast(table.shape, 4, self.axis) for table, _ in rotary.tables)
        else:
            sized = (name for name in rotary.ops if "sizes" in self.graph.op(name).attributes)
            self.way.of_heads += [(name, 0) for name in sized]
        for name in rotary.ops:
            result = self.graph.op(name).output
            inside = {op.name for op in self.graph.users(result)} <= rotary.ops and result not in self.graph.outputs
            if result != self.value and not inside:
                raise Escape("a part of its rotary embedding is used elsewhere")
        self.way.rotary = rotary
        self.way.crossed += sorted(rotary.ops)
        self.readers, self.value = set(rotary.ops), rotary.source

    def _of_gate(self, op: Op) -> bool:
        """A function of each number of a gate alone, or with it of one number a head."""
        if not self.is_gate or op.kind not in (Kind.POINTWISE, Kind.ADD, Kind.MUL):
            return False
        beside, rank = op.inputs[1:], len(self.value.shape)
        if self.split or any(value.width != 1 for value in beside) or op.inputs[0].shape != self.value.shape:
            return not beside
        self.way.by_head |= not all(is_broadcast(value.shape, rank, self.axis) for value in beside)
        return True

    def _parted(self, op: Op) -> bool:
        """Whether heads and their numbers stay together; or a gate, joined so far, was joined from heads here."""
        before, after = op.inputs[0].shape, self.value.shape
        if op.attributes.get("form") == "unsqueeze" and op.attributes["axis"] < len(before):
            return True
        if not self.is_gate or op.attributes.get("form") != "view":
            return False
        if before == after:
            self._states(op, len(after) - 1, len(after) - 1)
            return True
        if not joins(before, after, len(after) - 1):
            return False
        self.axis = len(before) - 2
        if before[-2:] != (self.way.heads, self.way.size):
            return False
        self._states(op, len(after) - 1, len(after) - 1)
        self.split = False
        return True

    def _apart(self, op: Op) -> bool:
        """Whether the op keeps heads and their width apart; the heads' axis is moved to where it is before it."""
        form, attributes = op.attributes.get("form"), op.attributes
        last = len(self.value.shape) - 1
        if form == "concat":
            own = added(self.graph, op)
            return attributes["axis"] not in (self.axis, last) and not self.repeated and len(own) == 1
        if form == "permute":
            order = attributes["order"]
            if self.turned:
                order, self.turned = (*order[:-2], order[-1], order[-2]), False
            beside = not self.repeated or order[self.axis + 1] == order[self.axis] + 1
            kept = beside and order[last] == last
            self.axis = order[self.axis]
            return bool(kept)
        if form == "unsqueeze" and self.repeated and attributes["axis"] == self.axis + 1:
            self.repeated = False
            return True
        if form == "unsqueeze" and not self.repeated and attributes["axis"] == self.axis:
            self.split, self.way.heads = True, 1
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
        if self.joint:
            self.joint, self.axis, self.way.in_place = False, 1, JOINT
            self.way.of_size.append((op.name, last))
            return parts_batch(before, after)
        if before == after and not self.repeated:
            self._states(op, axis, last)
            return True
        if not self.repeated and joins(before, after, axis) and self.way.groups == 1:
            self._states(op, axis, last)
            self.repeated, self.way.groups = True, whole(before[axis + 1])
            return True
        single = before == (*after[: axis + 1], *after[axis + 2 :]) and after[axis + 1] == 1
        if self.repeated and self.way.groups > 1 and single:  # an axis of one, which an expand behind it fills
            self._states(op, axis, last)
            self.repeated = False
            return True
        if self.repeated and joins(after, before, axis):  # they were only counted in two parts
            self._states(op, axis, last)
            self.repeated, self.way.groups, self.way.in_place = False, 1, COUNTED_TWICE
            return True
        if not self.repeated and axis == last - 1 and joins(after, squeezed(before), axis):
            self._states(op, axis, last)
            self.split, self.way.heads = True, whole(after[axis])
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
            return "it is put behind something that is no cache"
        return "it is reshaped in a way that is not understood" if form == "view" else in_words(op, "comes from")
