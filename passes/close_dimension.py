"""Follow one dimension from a value to everything it is coupled with, or say where it escapes."""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field

from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.passes.follow_places import LAST, is_elementwise, places_through, size_at

NORMS = (Kind.RMS_NORM, Kind.LAYER_NORM)


class Escape(Exception):
    """The dimension reaches something that is not understood; ``values`` are those it was followed through.

    ``permutes`` says that what it met lets other orders of its numbers through, if no other change of basis.
    """

    def __init__(self, reason: str, *, permutes: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.permutes = reason, permutes
        self.values: frozenset[Value] = frozenset()


@dataclass
class ClosedDimension:
    """A dimension with all its ends known: ``writers`` and ``readers`` are its ends, ``crossed`` stands between.

    ``normed`` are the values behind a norm. ``tables`` are parameters (..., width) that ops between read as they are:
    added or joined they write, like rows of an embedding that are not looked up. The lists of ops are in topological
    order. ``in_order`` says that only other orders of its numbers pass. ``places`` has the values and tables whose last
    axis it is not, with the axis, counted from the end.
    """

    width: int
    values: set[Value] = field(default_factory=set)
    normed: set[Value] = field(default_factory=set)
    writers: list[Op] = field(default_factory=list)
    readers: list[Op] = field(default_factory=list)
    norms: list[Op] = field(default_factory=list)
    crossed: list[Op] = field(default_factory=list)
    tables: list[Value] = field(default_factory=list)
    in_order: bool = False
    places: dict[Value, int] = field(default_factory=dict)

    @property
    def vectors(self) -> list[Value]:
        """The values whose last axis it is."""
        return [value for value in self.values if value not in self.places]


def close_dimension(graph: Graph, start: Value) -> ClosedDimension:
    """Everything coupled with the last dimension of ``start``.

    Raises:
        Escape: with the reason in words, when any way leads to an op or an end that is not understood.
    """
    return close(Walk(graph, start))


def close(walk: Walk) -> ClosedDimension:
    """Run a walk; an escape then names the values that it came through."""
    try:
        return walk.run()
    except Escape as escape:
        escape.values = frozenset(value for value in walk.values if value not in walk.places)
        raise


class Walk:
    """From one value's last axis through ops that keep its numbers apart from other axes', to linears and tables."""

    def __init__(self, graph: Graph, start: Value) -> None:
        self.graph = graph
        if start.width is None:
            raise Escape("its size is not fixed")
        self.width = start.width
        self.values: dict[Value, bool] = {}  # value -> whether it is behind a norm
        self.queue: deque[Value] = deque()
        self.ends: dict[str, set[Op]] = {"writers": set(), "readers": set(), "norms": set(), "crossed": set()}
        self.tables: dict[Value, None] = {}
        self.places: dict[Value, int] = {}  # of values and tables whose last axis it is not
        self.axes: set[tuple[Value, int]] = set()
        self.join(start, self._starts_normed(start))

    def _starts_normed(self, start: Value) -> bool:
        """A walk may start behind a norm: it then begins on the norm's other side."""
        value: Value | None = start
        while value is not None:
            op = self.graph.producer(value)
            if op is None or op.kind not in (Kind.KEEP, Kind.SCALE):
                return op is not None and op.kind in (Kind.RMS_NORM, Kind.LAYER_NORM)
            value = op.inputs[0]
        return False

    def run(self) -> ClosedDimension:
        while self.queue:
            value = self.queue.popleft()
            self._backwards(value)
            self._forwards(value)
        ordered = {end: sorted(ops, key=lambda op: self.graph.positions[op.name]) for end, ops in self.ends.items()}
        if not ordered["writers"] or not ordered["readers"]:
            raise Escape("nothing reads it" if ordered["writers"] else "no weight writes it")
        between = {op.name for op in (*ordered["norms"], *ordered["crossed"])}
        if any(op.name not in between for value in self.tables for op in self.graph.users(value)):
            raise Escape("a parameter that is combined with it is used elsewhere too")
        normed = {value for value, behind in self.values.items() if behind}
        self.check(ordered, normed)
        found = ClosedDimension(
            self.width,
            set(self.values),
            normed,
            writers=ordered["writers"],
            readers=ordered["readers"],
            norms=ordered["norms"],
            crossed=ordered["crossed"],
            tables=list(self.tables),
            places=self.places,
        )
        return found

    def check(self, ends: dict[str, list[Op]], normed: set[Value]) -> None:
        """Whether what was found together lets anything but other orders through."""
        if ends["norms"] and any(is_nonlinear(op, self.places) for op in ends["crossed"]):
            raise Escape("a nonlinearity and a norm act on the same width", permutes=True)
        if any(op.kind in NORMS for op in ends["writers"]) and not ends["norms"]:
            raise Escape("normalised values are added, each with a gain of its own", permutes=True)
        if any((op.kind is Kind.ADD or op.attributes.get("joins")) and op.output in normed for op in ends["crossed"]):
            raise Escape("two normalised values are added, each with a gain of its own", permutes=True)

    def join(self, value: Value, normed: bool, place: int = LAST) -> None:
        """Couple that axis of ``value``; a value cannot be on both sides of a norm."""
        if (value in self.values or value in self.tables) and self.places.get(value, LAST) != place:
            raise Escape("it lies on two axes of one value")
        if value in self.values:
            if self.values[value] != normed:
                raise Escape(
                    "post-norm or sandwich norm: a normalised value, gain and all, is added back to the stream, "
                    "so only permutations pass",
                    permutes=True,
                )
            return
        if (size := size_at(value, place)) != self.width:
            raise Escape(f"it is broadcast against a width of {size}")
        if value in self.graph.outputs:
            raise Escape("it is an output of the graph")
        if value.is_parameter:
            if not self.graph.parameter(value).is_floating_point():
                raise Escape("a parameter of whole numbers is combined with it")
            self.tables[value] = None
        if place != LAST:
            self.places[value] = place
        if value.is_parameter:
            return
        self.values[value] = normed
        self.queue.append(value)

    # -- towards the writers -----------------------------------------------------------------------

    def _backwards(self, value: Value) -> None:
        op = self.graph.producer(value)
        normed = self.values[value]
        if op is None:
            raise Escape("it comes from an input of the graph")
        if value in self.places or op.kind in (Kind.RESHAPE, Kind.CHANNELWISE):
            self._move(op, value, back=True)
        elif op.is_linear or op.kind is Kind.EMBEDDING:
            if normed:
                raise Escape("a weight writes it behind the norm", permutes=True)
            self.ends["writers"].add(op)
            self._couple_parameter(op, 0 if op.is_linear else 1)
        elif op.kind in NORMS:
            if not normed and (is_branch_norm(self.graph, op) or is_entry_norm(self.graph, op)):
                self.ends["writers"].add(op)
            else:
                self._norm(op)
        elif op.kind in (Kind.KEEP, Kind.SCALE, Kind.ADD, Kind.POINTWISE, Kind.MUL):
            self._cross(op, normed)
        else:
            raise Escape(in_words(op, "comes from"))

    # -- towards the readers -----------------------------------------------------------------------

    def _forwards(self, value: Value) -> None:
        users = self.graph.users(value)
        if not users:
            raise Escape("nothing reads it")
        for op in users:
            self._into(op, value)

    def _into(self, op: Op, value: Value) -> None:
        if value in self.places or op.kind in (Kind.RESHAPE, Kind.CHANNELWISE):
            self._move(op, value, back=False)
        elif op.is_linear and op.inputs[0] == value:
            self.ends["readers"].add(op)
            self._couple_parameter(op, 1)
        elif op.kind in NORMS and op.inputs[0] == value:
            if is_branch_norm(self.graph, op) or is_entry_norm(self.graph, op):
                why = "a norm acts on it on its way to the stream (sandwich norm, or one behind embeddings)"
                raise Escape(why, permutes=True)
            self._norm(op)
        elif op.kind is Kind.KEEP and value not in passed_on(op):
            raise Escape(in_words(op, "says which rows are taken by"))
        elif op.kind in (Kind.KEEP, Kind.SCALE, Kind.ADD, Kind.POINTWISE, Kind.MUL):
            self._cross(op, self.values[value])
        else:
            raise Escape(in_words(op, "goes into"), permutes=op.sums_width)

    def _norm(self, op: Op) -> None:
        self.ends["norms"].add(op)
        self.join(op.inputs[0], False)
        self.join(op.output, True)

    def _move(self, op: Op, value: Value, *, back: bool) -> None:
        """An op that moves axes, or any that meets the dimension where it is not the last axis."""
        normed, place = self.values[value], self.places.get(value, LAST)
        if is_elementwise(op):
            self._cross(op, normed, place)
            return
        found = places_through(op, place, back=back) if back or value == op.inputs[0] else None
        if found is None:
            on_last = place != LAST and (op.is_linear or op.kind in (*NORMS, Kind.MEAN))
            direction = "comes from" if back else "goes into"
            raise Escape(f"{op.spelling} acts on another of its axes" if on_last else in_words(op, direction))
        self.ends["crossed"].add(op)
        self.join(op.inputs[0], normed, found[0])
        self.join(op.output, normed, found[1])
        if op.kind is Kind.CHANNELWISE:
            self.join_channels(op)

    def join_channels(self, op: Op) -> None:
        """A convolution of each channel alone, and the like: no channel may be mixed with another before it."""
        raise Escape(f"{op.spelling} acts on each of its channels apart", permutes=True)

    def _cross(self, op: Op, normed: bool, place: int = LAST) -> None:
        """An op between: its output and all its inputs of this width are one dimension."""
        self.ends["crossed"].add(op)
        self.join(op.output, normed, place)
        for value in passed_on(op):
            if size_at(value, place) not in (1, None):
                if value.is_parameter and op.kind not in (Kind.ADD, Kind.KEEP):
                    raise Escape("a parameter is multiplied with it number by number", permutes=True)
                self.join(value, normed, place)
            elif op.kind is Kind.ADD and self.width > 1:
                raise Escape("one number is added to the whole width", permutes=True)

    def _couple_parameter(self, op: Op, axis: int) -> None:
        """A weight used twice is one weight: its other users' dimensions are this dimension too."""
        assert op.weight is not None
        if (op.weight, axis) in self.axes:
            return
        self.axes.add((op.weight, axis))
        for other in self.graph.users(op.weight):
            if other.weight != op.weight or not (other.is_linear or other.kind is Kind.EMBEDDING):
                raise Escape(f"its weight is also used by {other.spelling or other.kind}")
            if other.kind is Kind.EMBEDDING and axis == 0:
                continue  # the rows of a table are looked up, not written
            value = other.inputs[0] if other.is_linear and axis == 1 else other.output
            if value not in self.values:
                self.join(value, other.is_linear and axis == 1 and self._starts_normed(value))


def passed_on(op: Op) -> tuple[Value, ...]:
    """The inputs whose numbers an op between passes on; a KEEP's others say which rows it takes."""
    return op.inputs[:1] if op.kind is Kind.KEEP and not op.attributes.get("joins") else op.inputs


def is_branch_norm(graph: Graph, op: Op) -> bool:
    """Whether a norm stands at the end of a branch: what it puts out is added to a stream, and nothing else reads it.

    Such a norm writes the stream, gain and all; the dimension in front of it is another.
    """
    users = graph.users(op.output)
    while len(users) == 1 and users[0].kind in (Kind.KEEP, Kind.SCALE):
        users = graph.users(users[0].output)
    return bool(users) and all(user.kind is Kind.ADD for user in users)


def is_entry_norm(graph: Graph, op: Op) -> bool:
    """Whether a norm acts on nothing but embeddings and their sums: what it puts out is where a stream begins."""
    return any(user.kind is Kind.ADD for user in graph.users(op.output)) and _embeds(graph, op.inputs[0], op)


def _embeds(graph: Graph, value: Value, reader: Op) -> bool:
    producer = graph.producer(value)
    if producer is None or any(user.name != reader.name for user in graph.users(value)):
        return False
    if producer.kind is Kind.EMBEDDING:
        return True
    passes = producer.kind in (Kind.ADD, Kind.KEEP, Kind.SCALE)
    return passes and all(_embeds(graph, part, producer) for part in producer.inputs if part.width == value.width)


def is_nonlinear(op: Op, places: Container[Value] = ()) -> bool:
    """Whether an op between lets through no mixing of the width's numbers.

    Of a product in ``places``, off the last axis, it is not told whether it scales whole rows: it is taken for none.
    """
    return op.kind is Kind.POINTWISE or (op.kind is Kind.MUL and not (op.scales_rows and op.output not in places))


def in_words(op: Op, direction: str) -> str:
    """Why a dimension cannot be followed through this op; ``direction`` is "comes from" or "goes into"."""
    words = {
        Kind.RESHAPE: "it is split into heads or reshaped",
        Kind.ATTENTION: f"it {direction} attention",
        Kind.MEAN: "a mean is taken over it",
    }
    if op.attributes.get("over_width"):
        return "a deviation is taken over it"
    return words.get(op.kind, f"it {direction} {op.spelling or op.kind}, which is not understood")
