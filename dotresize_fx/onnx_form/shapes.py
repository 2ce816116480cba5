"""Shapes of ONNX values: those the file leaves out, and those that an edit made wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from dotresize_fx.graph import Kind
from dotresize_fx.onnx_form.form import Form, has_second_output
from dotresize_fx.onnx_form.kinds import read_form
from dotresize_fx.onnx_form.shape_rules import RULES

# Ops of ONNX Runtime's own that hand their first input's shape on and that ONNX's inference does not know.
SHAPE_KEEPERS = ("SimplifiedLayerNormalization", "Gelu", "FastGelu", "QuickGelu", "RotaryEmbedding")
_OF_ANOTHER_TYPE = (
    "And", "Cast", "CastLike", "ConstantOfShape", "Equal", "Greater", "GreaterOrEqual", "IsNaN", "Less", "LessOrEqual",
)  # fmt: skip
_LOG = logging.getLogger(ShapeInferencePass.__module__)
_KEEP_WIDTH = (Kind.KEEP, Kind.SCALE, Kind.POINTWISE, Kind.RMS_NORM, Kind.LAYER_NORM)


def complete_shapes(model: ir.Model) -> None:
    """Give shapes and types to values that have none, as far as ONNX's inference can tell; others stay as they are."""
    outputs = [value for node in model.graph for value in node.outputs if value.name]
    if all(value.shape is not None and value.type is not None for value in outputs):
        return
    _complete(model, outputs)
    for node in model.graph:
        _complete_types(node)


def _complete(model: ir.Model, outputs: list[ir.Value]) -> None:
    copy = model.clone()
    # In the copy, so that names, order of initializers and ops of the model itself stay untouched.
    for node in copy.graph:
        known = node.domain == "" and node.op_type != "SimplifiedLayerNormalization"
        if node.op_type in SHAPE_KEEPERS and not known and not has_second_output(node):
            node.resize_inputs(1)
            node.resize_outputs(1)
            node.attributes.clear()
            node.op_type, node.domain = "Identity", ""
    names = {value.name: value for node in copy.graph for value in node.outputs}
    if not _infer(copy):  # the file states something that does not follow
        for value in names.values():
            if not value.is_graph_output():
                value.shape = None
        _infer(copy)
    for value in outputs:
        found = names[value.name]
        value.shape = found.shape if value.shape is None else value.shape
        value.type = found.type if value.type is None else value.type


def _complete_types(node: ir.Node) -> None:
    """Behind an op that ONNX does not know inference finds nothing; most ops give what they are given."""
    if node.domain not in ("", "com.microsoft") or node.op_type not in RULES or node.op_type in _OF_ANOTHER_TYPE:
        return
    place = 1 if node.op_type == "Where" else 0
    source = node.inputs[place] if len(node.inputs) > place else None
    for output in node.outputs:
        if output.name and output.type is None and source is not None:
            output.type = source.type


def _infer(model: ir.Model) -> bool:
    """ONNX's inference, in place; returns whether it found anything."""
    level = _LOG.level  # what it says, with a traceback, is no user's business
    _LOG.setLevel(logging.CRITICAL)
    try:
        return ShapeInferencePass(check_type=False, strict_mode=False)(model).modified
    finally:
        _LOG.setLevel(level)


def set_width(value: ir.Value, width: int) -> bool:
    """Make ``width`` the value's last dimension; returns whether it was another one. An unknown shape stays so."""
    if not value.shape or value.shape[-1] == width:
        return False
    shape = value.shape.copy()
    shape[-1] = width
    value.shape = shape
    return True


def refresh_widths(graph: ir.Graph, touched: set[ir.Value], is_visible: Callable[[ir.Node], bool]) -> None:
    """Carry new widths on from the ``touched`` values, in one topological walk, until the next linear."""
    reached = set(touched)
    for node in graph:
        if reached.isdisjoint(value for value in node.inputs if value is not None) or not is_visible(node):
            continue
        width = _width(read_form(node))
        if width is not None and set_width(node.outputs[0], width):
            reached.add(node.outputs[0])


def _width(form: Form) -> int | None:
    """The width an op's output has by its inputs'; None for ops that no region runs through."""
    widths = [value.shape[-1] for value in form.inputs if value.shape]
    if form.kind in _KEEP_WIDTH and widths:
        return widths[0] if isinstance(widths[0], int) else None
    if form.kind in (Kind.ADD, Kind.MUL):
        return max((width for width in widths if isinstance(width, int)), default=None)
    return None
