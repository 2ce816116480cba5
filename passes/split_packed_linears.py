"""See a linear whose result is split into parts, such as query, key and value or gate and up, as one linear a part."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

from dotresize_fx.graph import Graph, Op
from dotresize_fx.packing import Packing
from dotresize_fx.passes.pass_base import Pass, PassResult, promise


class _Part(NamedTuple):
    """The op that takes the outputs from ``start`` to ``end`` (exclusive), each ``step``-th, of a packed linear."""

    op: Op
    start: int
    end: int
    step: int = 1


class SplitPackedLinears(Pass):
    """``split(linear(x, W, b), -1)`` becomes ``linear(x, W[rows], b[rows])`` for each of its parts; slices likewise,
    and the rows of a view.

    Query, key and value, or gate and up, then have widths of their own. What is left are several smaller products,
    which are emitted as they are. A weight that is used elsewhere stays whole, and so does one whose slices overlap
    or that something reads as a whole.
    """

    def call(self, graph: Graph) -> PassResult:
        packed = [op for op in graph.ops if _parts(graph, op)]
        records = tuple(self._split(graph, op) for op in packed)
        graph.remove_dead()
        return PassResult(records)

    def _split(self, graph: Graph, linear: Op) -> str:
        parts = sorted(_parts(graph, linear), key=lambda part: part.start)
        assert linear.weight is not None
        name = graph.parameter_name(linear.weight)
        weight, bias = graph.weight(linear), graph.bias(linear)
        seen: list[Op] = []
        for index, part in reversed(list(enumerate(parts))):  # each goes right behind what they read: so in order
            rows = graph.insert_linear(
                linear.inputs[0],
                weight[..., part.start : part.end : part.step, :].clone(),
                None if bias is None else bias[part.start : part.end : part.step].clone(),
                users=(),
                name=f"{name.removesuffix('.weight')}.{index}",
                like=linear,
            )
            beside = _unsqueezed(graph, linear)
            value = rows.output if beside is None else graph.insert_like(beside, rows.output)
            graph.redirect(graph.op(part.op.name), value)
            seen.append(rows)
        note_packing(graph, linear, seen[::-1], groups=1 if parts[0].step == 1 else 0)
        return f"{name}: seen as {len(parts)} linears"

    def ensures(self, graph: Graph) -> None:
        left = [op.name for op in graph.ops if _parts(graph, op)]
        promise(not left, f"packed linears are left: {left}")


def note_packing(graph: Graph, linear: Op, parts: list[Op], groups: int) -> None:
    """Note in the graph as which linears a packed one is seen, see :class:`Packing`."""
    for stored, seen in ((linear.weight, [op.weight for op in parts]), (linear.bias, [op.bias for op in parts])):
        if stored is not None:
            names = tuple(graph.parameter_name(value) for value in seen if value is not None)
            graph.packings[graph.parameter_name(stored)] = Packing(names, groups)


def _parts(graph: Graph, linear: Op) -> list[_Part]:
    """What takes the parts of this linear's result; empty when it is not split, or not only."""
    if not linear.is_linear or linear.output in graph.outputs or linear.output.width is None:
        return []
    assert linear.weight is not None
    unsqueezed = _unsqueezed(graph, linear)
    if unsqueezed is not None:
        parts = _split_parts(graph, unsqueezed, graph.users(unsqueezed.output))
        return parts if parts and len(graph.users(linear.weight)) == 1 else []
    users = graph.users(linear.output)
    forms = {op.attributes.get("form") for op in users}
    if forms == {"slice"}:
        parts = _slices(linear, users)
    elif forms == {"view"}:
        parts = _rows_of_view(graph, linear, users)
    else:
        parts = _strided(linear, users) if forms == {"strided"} else _split_parts(graph, linear, users)
    return parts if parts and len(graph.users(linear.weight)) == 1 else []


def _unsqueezed(graph: Graph, linear: Op) -> Op | None:
    """The op that alone reads the linear and puts an axis in, where the form can repeat it."""
    users = graph.users(linear.output)
    if not graph.states_views or len(users) != 1 or users[0].attributes.get("form") != "unsqueeze":
        return None
    kept = users[0].output.width == linear.output.width and users[0].output not in graph.outputs
    return users[0] if kept else None


def _split_parts(graph: Graph, linear: Op, users: list[Op]) -> list[_Part]:
    if len(users) != 1 or users[0].attributes.get("form") != "split":
        return []
    split = users[0]
    if split.attributes["axis"] != len(linear.output.shape) - 1:
        return []
    return [_Part(*part) for part in parts_of_split(graph, split)]


def parts_of_split(graph: Graph, split: Op) -> list[tuple[Op, int, int]]:
    """What takes each part of a split, and where on the axis it starts and ends; empty if something else reads it."""
    parts = graph.users(split.output)
    if not all(op.attributes.get("form") == "part" for op in parts):
        return []
    sizes = split.attributes["sizes"]
    ends = tuple(accumulate(sizes))
    indices = [op.attributes["index"] for op in parts]
    return [(op, ends[i] - sizes[i], ends[i]) for op, i in zip(parts, indices, strict=True)]


def _rows_of_view(graph: Graph, linear: Op, users: list[Op]) -> list[_Part]:
    """Gate and up as the two rows of a view (..., 2, n)."""
    *_, view = users
    rows, rank = view.output.shape[-2:-1], len(view.output.shape)
    if len(users) > 1 or rank != len(linear.output.shape) + 1 or view.output.shape[:-2] != linear.output.shape[:-1]:
        return []
    parts, size = graph.users(view.output), view.output.width
    axis = rank - 2
    if size is None or any(op.attributes.get("form") != "choice" or op.attributes["axis"] != axis for op in parts):
        return []
    starts = {op.attributes["index"] % int(rows[0]): op for op in parts}
    if len(starts) != len(parts) or view.output in graph.outputs or len(parts) != rows[0]:
        return []
    return [_Part(op, index * size, (index + 1) * size) for index, op in starts.items()]


def _slices(linear: Op, users: list[Op]) -> list[_Part]:
    """Several slices of the last axis that share nothing; one alone takes nothing apart."""
    last, width = len(linear.output.shape) - 1, linear.output.width
    assert width is not None
    if len(users) < 2 or any(op.attributes["axis"] != last for op in users):
        return []
    parts = sorted((_slice(op, width) for op in users), key=lambda part: part.start)
    apart = all(one.end <= other.start for one, other in pairwise(parts))
    return parts if apart and all(part.start < part.end for part in parts) else []


def _strided(linear: Op, users: list[Op]) -> list[_Part]:
    """Gate and up by turns: every step-th output from each start."""
    last, width, step = len(linear.output.shape) - 1, linear.output.width, users[0].attributes["step"]
    assert width is not None
    apart = sorted(op.attributes["start"] for op in users) == list(range(step))
    if not apart or any(op.attributes["axis"] != last or op.attributes["step"] != step for op in users):
        return []
    return [_Part(op, op.attributes["start"], width, step) for op in users]


def _slice(op: Op, width: int) -> _Part:
    start, end, _ = slice(op.attributes["start"], op.attributes["stop"]).indices(width)
    return _Part(op, start, end)
