"""See a rotary embedding that rotates halves: x * cos + cat(-x[upper half], x[lower half]) * sin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dotresize_fx.graph import Graph, Kind, Op, Value


@dataclass(frozen=True)
class Rotary:
    """What was matched. ``source`` is x, ``halves`` the slices (lower, upper), if any, ``ops`` everything between.

    ``tables`` are cosine and sine, each with the op that multiplies by it. ``partial`` says that only the first
    numbers of a head are rotated and the rest is passed around.
    """

    source: Value
    halves: tuple[str, ...]
    tables: tuple[tuple[Value, str], ...]
    ops: frozenset[str]
    partial: bool = False


def match_rotary(graph: Graph, value: Value) -> Rotary | None:
    """The rotary embedding whose result is ``value``; None when what computes it is none, or one spelled otherwise."""
    op = graph.producer(value)
    if op is None:
        return None
    if op.attributes.get("rotary"):
        tables = tuple((table, op.name) for table in op.inputs[1:3])
        return Rotary(op.inputs[0], (), tables, frozenset({op.name}))
    if op.attributes.get("form") == "concat":
        return _match_partial(graph, op)
    if op.kind is not Kind.ADD or op.attributes.get("subtract") or len(op.inputs) != 2:
        return None
    products = [graph.producer(term) for term in op.inputs]
    for straight, turned in (products, products[::-1]):
        if straight is None or turned is None or straight.kind is not Kind.MUL or turned.kind is not Kind.MUL:
            return None
        for half_turn, sine in _factors(turned):
            matched = _match_half_turn(graph, half_turn)
            for source, cosine in _factors(straight):
                if matched is None or matched.source != source:
                    continue
                tables = ((cosine, straight.name), (sine, turned.name))
                if all(table.width == value.width for table, _ in tables):
                    return replace(matched, tables=tables, ops=matched.ops | {op.name, straight.name, turned.name})
    return None


def _factors(product: Op) -> Iterator[tuple[Value, Value]]:
    if len(product.inputs) == 2:
        yield product.inputs
        yield product.inputs[::-1]


def _match_half_turn(graph: Graph, value: Value) -> Rotary | None:
    joined = graph.producer(value)
    if joined is None or not _joins_last(joined) or len(joined.inputs) != 2:
        return None
    negative, lower = (graph.producer(part) for part in joined.inputs)
    if negative is None or lower is None or negative.kind is not Kind.SCALE or negative.attributes["number"] != -1:
        return None
    upper = graph.producer(negative.inputs[0])
    if upper is None or value.width is None or value.width % 2 or upper.inputs[0] != lower.inputs[0]:
        return None
    half, source = value.width // 2, lower.inputs[0]
    if source.width != value.width or _range(lower) != (0, half) or _range(upper) != (half, value.width):
        return None
    between = frozenset({joined.name, negative.name, lower.name, upper.name})
    return Rotary(source, (lower.name, upper.name), (), between)


def _match_partial(graph: Graph, joined: Op) -> Rotary | None:
    """``cat(rotary(x[:r]), x[r:])``."""
    if not _joins_last(joined) or len(joined.inputs) != 2:
        return None
    turned, rest = match_rotary(graph, joined.inputs[0]), graph.producer(joined.inputs[1])
    first = None if turned is None else graph.producer(turned.source)
    if turned is None or rest is None or first is None or first.inputs[:1] != rest.inputs[:1]:
        return None
    width, size = joined.output.width, turned.source.width
    if first.inputs[0].width != width or _range(first) != (0, size) or _range(rest) != (size, width):
        return None
    ops = turned.ops | {joined.name, rest.name, first.name}
    return replace(turned, source=first.inputs[0], ops=ops, partial=True)


def _joins_last(op: Op) -> bool:
    return op.attributes.get("form") == "concat" and op.attributes["axis"] == len(op.output.shape) - 1


def _range(op: Op) -> tuple[int, int] | None:
    """What a slice of the last dimension takes; None for any other op."""
    source = op.inputs[0] if op.inputs else None
    if source is None or source.width is None or op.attributes.get("form") != "slice":
        return None
    if op.attributes["axis"] != len(source.shape) - 1:
        return None
    stop = op.attributes["stop"]
    return op.attributes["start"], source.width if stop is None else stop
