"""Where a dimension lies in a value: the last axis, or another behind permutations and views, as images have it."""

from __future__ import annotations

from dotresize_fx.graph import Kind, Op, Value
from dotresize_fx.passes.head_axes import Shape

# A place is an axis counted from the end, as broadcasting counts.
LAST = -1


def size_at(value: Value, place: int) -> int | str | None:
    """1 where the value is the same along the axis for want of it; None of a number, which has no axes."""
    if not value.shape:
        return None
    return value.shape[place] if len(value.shape) >= -place else 1


def is_elementwise(op: Op) -> bool:
    """Whether each number of the output follows from the numbers at the same place."""
    if op.kind in (Kind.SCALE, Kind.ADD, Kind.POINTWISE, Kind.MUL):
        return True
    return op.kind is Kind.KEEP and "cast" in op.attributes  # casts and copies: others move numbers or leave some out


def places_through(op: Op, place: int, *, back: bool) -> tuple[int, int] | None:
    """The places in an op's first input and in its output, one of which is ``place``: the output's with ``back``.

    None where the op does not keep the dimension one axis.
    """
    before, after = op.inputs[0].shape if op.inputs else (), op.output.shape
    other = _moved(op, after if back else before, before if back else after, place, back=back)
    if other is None:
        return None
    return (other, place) if back else (place, other)


def _moved(op: Op, source: Shape, target: Shape, place: int, *, back: bool) -> int | None:
    axis = place + len(source)
    if op.kind is Kind.CHANNELWISE:
        channels: int = op.attributes["channels"]
        return channels - len(target) if axis == channels else None
    if op.attributes.get("form") == "permute":
        order: tuple[int, ...] = op.attributes["order"]
        return (order[axis] if back else order.index(axis)) - len(target)
    is_view = op.attributes.get("form") == "view" and not op.attributes.get("view_as")
    if not (is_view or op.attributes.get("flattens")):
        return None
    if source[: axis + 1] == target[: axis + 1]:
        return axis - len(target)
    return place if source[place:] == target[place:] else None
