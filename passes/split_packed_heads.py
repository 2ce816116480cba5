"""See a linear that writes query, key and value of one head after the other as one linear a part."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.passes.pass_base import Pass, PassResult
from dotresize_fx.passes.split_packed_linears import note_packing, parts_of_split


class _Part(NamedTuple):
    """``op`` takes, of each head's outputs, those from ``start`` to ``end`` (exclusive)."""

    op: Op
    start: int
    end: int


class _Packed(NamedTuple):
    """A linear whose result is seen as (..., heads, size), then perhaps permuted, then taken apart.

    Where it is seen as (..., parts, heads, size) instead ``heads`` is 1, ``last`` (heads, size).
    """

    linear: Op
    view: Op
    permute: Op | None
    heads: int
    axes: int  # that the view makes of the width
    parts: list[_Part]
    shaped: list[Op]  # read nothing of it but its shape and dtype
    last: tuple[int, ...] = ()


class SplitPackedHeads(Pass):
    """``split(view(linear(x, W), (..., heads, size)), -1)`` becomes ``view(linear(x, W[rows]), ...)`` a part.

    GPT-NeoX packs query, key and value so, latent attention the keys' unrotated part and the values; ModernBERT all
    heads' queries, then keys, then values, by ``unbind``. A part that
    overlaps another or that nothing takes stays out: the whole is left as it is. Only where the form can state a view.
    """

    def call(self, graph: Graph) -> PassResult:
        records: list[str] = []
        if not graph.states_views:
            return PassResult()
        for name in [op.name for op in graph.ops if op.kind is Kind.LINEAR]:
            packed = _packed(graph, graph.op(name))
            if packed is not None:
                records.append(self._split(graph, packed))
        graph.remove_dead()
        return PassResult(tuple(records))

    @staticmethod
    def _split(graph: Graph, packed: _Packed) -> str:
        linear = packed.linear
        assert linear.weight is not None
        name = graph.parameter_name(linear.weight).removesuffix(".weight")
        weight, bias = graph.weight(linear), graph.bias(linear)
        size = len(weight) // packed.heads
        rows = torch.arange(len(weight), device=weight.device).view(packed.heads, size)
        first = None
        seen: list[Op] = []
        for index, part in enumerate(packed.parts):
            taken = rows[:, part.start : part.end].flatten()
            made = graph.insert_linear(
                _unshaped(graph, packed),
                weight[taken].clone(),
                None if bias is None else bias[taken].clone(),
                users=(),
                name=f"{name}.{index}",
            )
            seen.append(made)
            last = packed.last or (packed.heads, part.end - part.start)
            value = graph.insert_like(packed.view, made.output, last, packed.axes)
            if packed.permute is not None:
                value = graph.insert_like(packed.permute, value)
            graph.redirect(graph.op(part.op.name), value)
            first = value if first is None else first
        note_packing(graph, linear, seen, packed.heads)
        for op in packed.shaped:
            assert first is not None
            graph.reread(graph.op(op.name), first)
        return f"{name}: seen as {len(packed.parts)} linears, head by head"


def _unshaped(graph: Graph, packed: _Packed) -> Value:
    """What the linear reads, before a reshape of its rows where the view undoes that."""
    value, rank = packed.linear.inputs[0], len(packed.view.output.shape) + 1 - packed.axes
    op = graph.producer(value)
    if len(value.shape) != rank and op is not None and op.attributes.get("reshape"):
        before = op.inputs[0]
        if len(before.shape) == rank and before.shape[:-1] == packed.view.output.shape[: rank - 1]:
            return before
    return value


def _packed(graph: Graph, linear: Op) -> _Packed | None:
    users = graph.users(linear.output)
    assert linear.weight is not None
    if len(users) != 1 or linear.output in graph.outputs or len(graph.users(linear.weight)) > 1:
        return None
    view = users[0]
    width, shape = linear.output.width, view.output.shape
    if view.attributes.get("form") != "view" or view.output in graph.outputs or len(shape) < 3 or width is None:
        return None
    if (outer := _packed_outside(graph, linear, view)) is not None:
        return outer
    heads, taken = _heads_of(shape, width)
    if heads == 0:
        return None
    value, permute, axis = view.output, None, len(shape) - taken
    users = graph.users(value)
    if len(users) == 1 and users[0].attributes.get("form") == "permute" and taken == 1:
        permute = users[0]
        if permute.attributes["order"][-1] != len(shape) - 1 or permute.output in graph.outputs:
            return None
        value, users = permute.output, graph.users(permute.output)
    shaped = [op for op in users if op.attributes.get("form") == "shaped like"]
    users = [op for op in users if op not in shaped]
    inner = shape[-1] if taken == 2 else 1
    count = shape[-2] if taken == 2 else shape[-1]
    assert isinstance(inner, int)
    assert isinstance(count, int)
    parts = _taken_apart(graph, users, axis, count)
    if len(parts) < 2 or [p.start for p in parts] != [0, *(p.end for p in parts[:-1])] or parts[-1].end != count:
        return None
    if _come_together(graph, parts):
        return None
    # Slices keep the axis that they take from, and choices do not: of parts with several numbers only these are parts.
    if taken == 2 and any(part.op.output.shape != (*shape[:-2], inner) for part in parts):
        return None
    if taken == 1 and any(part.op.output.shape != (*value.shape[:-1], part.end - part.start) for part in parts):
        return None
    return _Packed(
        linear, view, permute, heads, 1 + taken, [_Part(o, s * inner, e * inner) for o, s, e in parts], shaped
    )


def _packed_outside(graph: Graph, linear: Op, view: Op) -> _Packed | None:
    """Query, key and value of all heads one after the other, (..., parts, heads, size), taken apart at once."""
    users, shape, width = graph.users(view.output), view.output.shape, linear.output.width
    axis = len(shape) - 3
    if len(users) != 1 or users[0].attributes.get("form") != "unbind" or users[0].attributes["axis"] != axis:
        return None
    count, heads, size = shape[-3:]
    if not (isinstance(count, int) and isinstance(heads, int) and isinstance(size, int)):
        return None
    if count * heads * size != width:
        return None
    parts = [_Part(op, start * heads * size, end * heads * size) for op, start, end in parts_of_split(graph, users[0])]
    if len(parts) != count or len({part.start for part in parts}) != count:
        return None
    return _Packed(linear, view, None, 1, 3, parts, [], (heads, size))


def _come_together(graph: Graph, parts: list[_Part]) -> bool:
    """Whether all parts go into the same inputs of attentions: then they are parts of one head, as where only some of
    its numbers are rotated.
    """
    reached = [frozenset(_attended(graph, part.op)) for part in parts]
    return bool(reached[0]) and len(set(reached)) == 1


def _attended(graph: Graph, start: Op) -> set[tuple[str, int]]:
    """The attentions that an op's result goes into, and as which of their inputs."""
    found: set[tuple[str, int]] = set()
    seen, waiting = {start.output}, [start.output]
    while waiting:
        value = waiting.pop()
        for op in graph.users(value):
            if op.kind is Kind.ATTENTION:
                found |= {(op.name, i) for i, read in enumerate(op.inputs) if read == value}
            elif not op.is_linear and op.output not in seen:
                seen.add(op.output)
                waiting.append(op.output)
    return found


def _heads_of(shape: tuple[int | str, ...], width: int) -> tuple[int, int]:
    """(heads, axes of one head's numbers) of a view of ``width``: (..., heads, size) or (..., heads, parts, size)."""
    for axes in (1, 2):
        sizes = shape[-1 - axes :]
        if len(shape) < axes + 2 or not all(isinstance(size, int) for size in sizes):
            continue
        product = 1
        for size in sizes:
            product *= int(size)
        if product == width and int(sizes[0]) > 0:
            return int(sizes[0]), axes
    return 0, 0


def _taken_apart(graph: Graph, users: list[Op], axis: int, size: int) -> list[_Part]:
    """The parts in their order; empty when one of the users is no slice, split or choice along the axis."""
    parts = []
    for op in users:
        form, attributes = op.attributes.get("form"), op.attributes
        if form == "slice" and attributes["axis"] == axis:
            start, end, _ = slice(attributes["start"], attributes["stop"]).indices(size)
            parts.append(_Part(op, start, end))
        elif form == "choice" and attributes["axis"] == axis:
            parts.append(_Part(op, attributes["index"] % size, attributes["index"] % size + 1))
        elif form == "split" and attributes["axis"] == axis:
            found = parts_of_split(graph, op)
            if not found:
                return []
            parts += [_Part(*part) for part in found]
        else:
            return []
    return sorted(parts, key=lambda part: part.start)
