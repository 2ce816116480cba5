"""Rotary embedding as ONNX's op for it, where heads have kept some of their pairs and so read a part of the tables."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
import onnx_ir
from onnx_ir import tape

from dotresize_fx.export.replace_value import replace_value
from dotresize_fx.onnx_form.constants import integers, number


@dataclass(frozen=True)
class _Table:
    """``full`` (batch, length, size) are cosines or sines of angles that come twice; ``pairs`` are picked of them."""

    full: onnx_ir.Value
    pairs: tuple[int, ...]


def fuse_rotary(model: onnx_ir.Model) -> int:
    """Write turned heads that read picked columns of the tables as one op; returns how many.

    before::

        cos, sin = Gather(Unsqueeze(cosines), kept), Gather(Unsqueeze(sines), kept)     # (batch, 1, length, width)
        turned = Add(Mul(x, cos), Mul(Concat(Neg(Slice(x, half:)), Slice(x, :half)), sin))

    after::

        turned = RotaryEmbedding(x, Gather(cosines, pairs), Gather(sines, pairs))       # (batch, length, width / 2)

    Whole tables are left to transformers' own fusion.
    """
    graph = model.graph
    picked: dict[_Table, onnx_ir.Value] = {}
    fused = 0
    for node in [node for node in graph if node.op_type == "Add"]:
        found = _turned(node)
        if found is None:
            continue
        x, cosines, sines = found
        written, where = tape.Tape(graph), dict(node.metadata_props)
        tables = []
        for table in (cosines, sines):
            if table not in picked:
                name = f"{table.full.name}_pairs_{len(picked)}"
                indices = written.initializer(onnx_ir.Tensor(np.array(table.pairs, np.int64), name=name), name)
                picked[table] = written.op(
                    "Gather", [table.full, indices], attributes={"axis": 2}, metadata_props=where
                )
                picked[table].type = table.full.type
                picked[table].shape = onnx_ir.Shape([*table.full.shape[:2], len(table.pairs)])  # type: ignore[index]
            tables.append(picked[table])
        out = written.op("RotaryEmbedding", [x, *tables], metadata_props=where)
        graph.insert_before(node, written.nodes)
        replace_value(node.outputs[0], out)
        fused += 1
    return fused


def _turned(node: onnx_ir.Node) -> tuple[onnx_ir.Value, _Table, _Table] | None:
    """What an Add turns, (batch, heads, length, width), and its tables of cosines and sines."""
    straight, crossed = (_made_by(value, "Mul") for value in node.inputs)
    if straight is None or crossed is None:
        return None
    for one, other in permutations((straight, crossed)):
        for (x, cosines), (halves, sines) in product(permutations(one.inputs), permutations(other.inputs)):
            if x is None or not _swaps_halves(halves, x):
                continue
            first, second = _table(cosines), _table(sines)
            if first is not None and second is not None:
                return x, first, second
    return None


def _swaps_halves(value: onnx_ir.Value | None, x: onnx_ir.Value) -> bool:
    """Whether ``value`` is Concat(-second half of x, first half of x) along its last axis."""
    joined = _made_by(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or x.shape is None or not isinstance(width := x.shape[-1], int):
        return False
    negated = _made_by(joined.inputs[0], "Neg")
    second = None if negated is None else negated.inputs[0]
    return _is_part(second, x, width // 2, width) and _is_part(joined.inputs[1], x, 0, width // 2)


def _is_part(value: onnx_ir.Value | None, x: onnx_ir.Value, start: int, stop: int) -> bool:
    node = _made_by(value, "Slice")
    if node is None or node.inputs[0] is not x or x.shape is None:
        return False
    numbers = [integers(each) for each in node.inputs[1:]]
    if len(numbers) < 3 or any(found is None or len(found) != 1 for found in numbers):
        return False
    begin, end, axis, *step = (found[0] for found in numbers if found is not None)
    return (begin, min(end, stop), axis % len(x.shape), step or [1]) == (start, stop, len(x.shape) - 1, [1]) and (
        end == stop or stop == x.shape[-1]
    )


def _table(value: onnx_ir.Value | None) -> _Table | None:
    """Picked columns of a table, where they are pairs of one angle."""
    gather = _made_by(value, "Gather")
    if gather is None or gather.inputs[1] is None or gather.inputs[0] is None:
        return None
    shape, kept = gather.inputs[0].shape, integers(gather.inputs[1])
    axis = gather.attributes.get_int("axis", 0)
    if shape is None or len(shape) != 4 or axis % 4 != 3 or kept is None or len(kept) % 2:
        return None
    added = _made_by(gather.inputs[0], "Unsqueeze")
    full = None if added is None or integers(added.inputs[1]) != [1] else added.inputs[0]
    if full is None or full.shape is None or not isinstance(size := full.shape[-1], int) or not _comes_twice(full):
        return None
    half = len(kept) // 2
    return _Table(full, tuple(kept[:half])) if kept[half:] == [pair + size // 2 for pair in kept[:half]] else None


def _comes_twice(value: onnx_ir.Value) -> bool:
    """Whether the second half of the last axis is the first: functions of angles that are joined to themselves."""
    node = value.producer()
    while node is not None and node.op_type in ("Cos", "Sin", "Cast", "Mul"):
        if any(number(each) is None for each in node.inputs[1:]) or node.inputs[0] is None:
            return False
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "Concat" and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]


def _made_by(value: onnx_ir.Value | None, op_type: str) -> onnx_ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain == "" else None
