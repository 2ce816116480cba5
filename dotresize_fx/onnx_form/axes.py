"""Which dimensions an ONNX op acts on, and whether the last one, a value's width, is among them."""

from __future__ import annotations

import onnx_ir as ir

from dotresize_fx.onnx_form.constants import integers
from dotresize_fx.onnx_form.linears import attribute


def axes(node: ir.Node) -> list[int] | None:
    """The axes an op acts on, from its attribute (old opsets) or its input; None when they are computed."""
    given = node.attributes.get("axes")
    if given is not None:
        return list(given.as_ints())
    position = 3 if node.op_type == "Slice" else 1
    value = node.inputs[position] if len(node.inputs) > position else None
    if value is not None:
        return integers(value)
    starts = integers(node.inputs[1]) if node.op_type == "Slice" and len(node.inputs) > 1 else None
    return None if starts is None else list(range(len(starts)))


def last(node: ir.Node) -> int:
    """Index of the input's last dimension counted from the front; -1 matches where the rank is unknown."""
    source = node.inputs[0]
    return -1 if source is None or source.shape is None else len(source.shape) - 1


def declared_width(node: ir.Node) -> tuple[ir.Node | None, list[int]] | None:
    """Where a Reshape's target says its last size: (Concat, its last constant part) or (None, the constant)."""
    target = node.inputs[1] if len(node.inputs) > 1 else None
    sizes = integers(target)
    if sizes:
        return None, sizes
    concat = target.producer() if target is not None else None
    if concat is None or concat.op_type != "Concat" or concat.domain != "":
        return None
    part = integers(concat.inputs[-1])
    return (concat, part) if part else None


def keeps_width(node: ir.Node) -> bool:
    """A reshape between tensors of one static last dimension joins or splits the others only."""
    source, output = node.inputs[0], node.outputs[0]
    declared = declared_width(node)
    if declared is None or source is None or not source.shape or not output.shape:
        return False
    before, after, said = source.shape[-1], output.shape[-1], declared[1][-1]
    if not isinstance(before, int) or before != after:
        return False
    return said in (-1, before) or (said == 0 and len(source.shape) == len(output.shape))


def sees_width(node: ir.Node) -> bool:
    """Whether the size of the last dimension is among what a Shape op hands on."""
    source = node.inputs[0]
    if source is None or source.shape is None:
        return True
    rank = len(source.shape)
    start, end = int(attribute(node, "start", 0)), int(attribute(node, "end", rank))
    if rank - 1 not in range(*slice(start, end).indices(rank)):
        return False
    output = node.outputs[0]
    if output.is_graph_output():
        return True
    length = len(range(*slice(start, end).indices(rank)))
    for user, _ in output.uses():
        picked = integers(user.inputs[1]) if user.op_type == "Gather" and user.domain == "" else None
        if picked is None or any(index % length == length - 1 for index in picked):
            return True
    return False
