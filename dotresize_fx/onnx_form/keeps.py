"""Ops that hand the last axis on as it is, numbers and all."""

from __future__ import annotations

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype

from dotresize_fx.graph import Kind
from dotresize_fx.onnx_form.axes import axes, keeps_width
from dotresize_fx.onnx_form.constants import constant
from dotresize_fx.onnx_form.form import Form, all_inputs, form_of
from dotresize_fx.onnx_form.linears import attribute


def read_keep(node: ir.Node) -> Form | None:
    """A KEEP, or a Where of tensors of one width; None where the last axis may change."""
    output = node.outputs[0]
    # The graph's own output keeps its name, so an op that only passes it on has to stay.
    free = not output.is_graph_output()
    match node.op_type:
        case "Identity":
            return form_of(node, Kind.KEEP, no_op=free, cast=False)
        case "Dropout":
            training = node.inputs[2] if len(node.inputs) > 2 else None
            tensor = constant(training)
            if training is not None and (tensor is None or tensor.numpy().any()):
                return None
            return form_of(node, Kind.KEEP, no_op=free, cast=False)
        case "Cast" | "CastLike":
            before, after = _float_dtype(node.inputs[0]), _float_dtype(output)
            if after is None:
                return None  # unknown, or a cast to integers, which cuts the fraction off
            widens = before is not None and torch.promote_types(before, after) == after
            return form_of(node, Kind.KEEP, no_op=free and before == after, cast=True, widens=widens)
        case "Slice" | "Unsqueeze" | "Squeeze":
            chosen = axes(node)
            return None if chosen is None else keep_if_not_last(node, chosen)
        case "Split":
            return keep_if_not_last(node, [int(attribute(node, "axis", 0))])
        case "Reshape" | "Expand" if keeps_width(node):
            return form_of(node, Kind.KEEP, no_op=False, reshape=True)
        case "Concat" if _joins_others(node):
            return Form(Kind.KEEP, node, node, all_inputs(node), {"no_op": False, "joins": True})
        case "Where":
            widths = {value.shape[-1] if value is not None and value.shape else None for value in node.inputs}
            if len(widths) == 1 and None not in widths:
                return Form(Kind.POINTWISE, node, node, all_inputs(node), {"function": "where", "number": None})
    return None


def _joins_others(node: ir.Node) -> bool:
    """Whether tensors of one last axis are put together along another."""
    widths = {value.shape[-1] if value is not None and value.shape else None for value in node.inputs}
    rank = len(node.outputs[0].shape or ())
    return rank > 1 and len(widths) == 1 and int(attribute(node, "axis", 0)) % rank != rank - 1


def _float_dtype(value: ir.Value | None) -> torch.dtype | None:
    if value is None or value.dtype is None or not value.dtype.is_floating_point():
        return None
    return to_torch_dtype(value.dtype)


def keep_if_not_last(node: ir.Node, chosen: list[int]) -> Form | None:
    """KEEP when none of the axes is the last: of the output for Unsqueeze, of the input for the others."""
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    rank = len(source.shape) + (len(chosen) if node.op_type == "Unsqueeze" else 0)
    if rank == 0 or any(axis % rank == rank - 1 for axis in chosen):
        return None
    return form_of(node, Kind.KEEP, no_op=False)
