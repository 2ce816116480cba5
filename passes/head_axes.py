"""What ops between an attention and its linears do to the axes that heads and their numbers lie on."""

from __future__ import annotations

from dotresize_fx.graph import Graph, Kind, Op, Value

Shape = tuple[int | str, ...]


def stays(op: Op) -> bool:
    """A cast, a copy or a factor: every number stays in its place."""
    untouched = op.kind in (Kind.KEEP, Kind.SCALE) and op.attributes.get("form") in (None, "slice")
    return untouched and op.inputs[0].shape == op.output.shape


def joins(apart: Shape, joined: Shape, axis: int) -> bool:
    """Whether a reshape from ``apart`` to ``joined`` joins this axis with the next and leaves the others alone."""
    if len(apart) != len(joined) + 1 or len(apart) < axis + 2:
        return False
    outer, inner, whole = apart[axis], apart[axis + 1], joined[axis]
    others = apart[:axis] == joined[:axis] and apart[axis + 2 :] == joined[axis + 1 :]
    if not (isinstance(outer, int) and isinstance(inner, int) and isinstance(whole, int)):
        return False
    return others and outer * inner == whole


def parts_batch(apart: Shape, joined: Shape) -> bool:
    """Whether a reshape from ``joined`` to ``apart`` takes the batch and the heads, one axis so far, apart."""
    return len(apart) == 4 and len(joined) == 3 and apart[2:] == joined[1:] and isinstance(apart[1], int)


def squeezed(shape: Shape) -> Shape:
    """Without the axes of size 1, the last left out: a reshape does not tell them apart."""
    return (*(size for size in shape[:-1] if size != 1), *shape[-1:])


def whole(size: int | str) -> int:
    assert isinstance(size, int)
    return size


def added(graph: Graph, op: Op) -> list[Value]:
    """What a concatenation puts together, less a cache: what is empty, or an input that an output carries on."""
    carried = op.output in graph.outputs
    filled = [value for value in op.inputs if 0 not in value.shape]
    return [v for v in filled if v.is_parameter or graph.producer(v) is not None or not carried]


def is_broadcast(shape: Shape, rank: int, axis: int) -> bool:
    """Whether a tensor of this shape is the same along an axis of the tensors of this rank it is broadcast to."""
    own = axis - (rank - len(shape))
    return own < 0 or shape[own] == 1
