"""What each ONNX op is in the neutral view: its kind, its activations and where its parameters are plugged in."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from dotresize_fx.graph import Kind
from dotresize_fx.onnx_form.attention_ops import read_attention_op, read_rotary_op
from dotresize_fx.onnx_form.axes import axes, keeps_width, last, sees_width
from dotresize_fx.onnx_form.constants import constant, is_ones, is_weight, number
from dotresize_fx.onnx_form.form import Form, all_inputs, form_of, has_second_output
from dotresize_fx.onnx_form.keeps import keep_if_not_last, read_keep
from dotresize_fx.onnx_form.linears import attribute, bias_slot, linear_core, slots, stored_transposed
from dotresize_fx.onnx_form.moves import axes_form
from dotresize_fx.onnx_form.quantised import quantised_weight

DOMAINS = ("", "com.microsoft")
POINTWISE = {
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Relu": "relu",
    "Gelu": "gelu",
    "FastGelu": "gelu",
    "QuickGelu": "quick_gelu",
    "Erf": "erf",
    "Exp": "exp",
    "Abs": "abs",
    "Sqrt": "sqrt",
    "Reciprocal": "reciprocal",
    "Softplus": "softplus",
    "LeakyRelu": "leaky_relu",
    "Elu": "elu",
    "Mish": "mish",
    "HardSwish": "hardswish",
    "HardSigmoid": "hardsigmoid",
    "Silu": "silu",
    "Swish": "silu",
}
RMS_NORMS = ("RMSNormalization", "SimplifiedLayerNormalization")
NORMS = ("LayerNormalization", *RMS_NORMS)
RESHAPE = ("Reshape", "Transpose", "Split", "Concat", "Flatten", "Expand", "DepthToSpace", "SpaceToDepth")
ATTENTION = (
    "Attention",
    "MultiHeadAttention",
    "GroupQueryAttention",
    "DecoderMaskedMultiHeadAttention",
    "PackedMultiHeadAttention",
    "PagedAttention",
    "SparseAttention",
)


def shown_outputs(node: ir.Node) -> list[int]:
    """Which outputs of a node the view shows as an op's each: all of a Split that are read, else the first."""
    if node.op_type != "Split" or node.domain != "":
        return [0]
    return [i for i, output in enumerate(node.outputs) if output.uses() or output.is_graph_output()] or [0]


def read_form(node: ir.Node, index: int = 0) -> Form:
    """The node as the view shows it; ``node`` is not one that :func:`is_part_of_linear` hides."""
    core = linear_core(node)
    if core is not None:
        source = core.inputs[0]
        assert source is not None
        if _is_of_joined_rows(core):
            return Form(Kind.ADDMM, core, node, tuple(value for value in (core.inputs[2], *core.inputs[:2]) if value))
        return Form(Kind.LINEAR, core, node, (source,), weight=(core, 1), bias=bias_slot(core))
    for known, read in ((Kind.ATTENTION, read_attention_op(node)), (Kind.OTHER, read_rotary_op(node))):
        if read is not None:
            return Form(known, node, node, *read)
    alone = node.op_type == "Split" or not has_second_output(node)
    form = _read_known(node) if node.domain in DOMAINS and alone else None
    if form is None:
        form = _read_unknown(node)
    moved = axes_form(node, index)
    return replace(form, attributes={**form.attributes, **moved}, index=index) if moved or index else form


def _is_of_joined_rows(node: ir.Node) -> bool:
    """Whether a Gemm with a bias stands between a Reshape to a matrix and Reshapes back."""
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node.op_type != "Gemm" or len(node.inputs) < 3 or node.inputs[2] is None or source is None:
        return False
    back = [use.node for use in node.outputs[0].uses()]
    around = all(other.op_type == "Reshape" and keeps_width(other) for other in (source, *back))
    shape = source.inputs[0].shape if source.inputs and source.inputs[0] is not None else None
    shapes = [other.outputs[0].shape for other in back]
    return (
        around
        and shape is not None
        and not node.outputs[0].is_graph_output()
        and bool(back)
        and all(other is not None and list(other)[:-1] == list(shape)[:-1] for other in shapes)
    )


def _read_unknown(node: ir.Node) -> Form:
    kind = Kind.OTHER
    if node.domain in DOMAINS and node.op_type in (*RESHAPE, *ATTENTION):
        kind = Kind.RESHAPE if node.op_type in RESHAPE else Kind.ATTENTION
    quantised = quantised_weight(node) if node.domain in DOMAINS else None
    return Form(kind, node, node, all_inputs(node), {} if quantised is None else {"quantised": quantised})


def _read_known(node: ir.Node) -> Form | None:
    op = node.op_type
    if not node.inputs or node.inputs[0] is None:
        return None
    if op in NORMS:
        return _norm(node)
    if op == "Gather":
        return _gather(node)
    if op == "Shape":
        return Form(Kind.OTHER, node, node, all_inputs(node) if sees_width(node) else ())
    if op in ("Add", "Sub", "Mul", "Div", "Pow"):
        return _binary(node)
    if op == "Neg":
        return form_of(node, Kind.SCALE, number=-1)
    if op == "Clip":
        return form_of(node, Kind.POINTWISE, function="clamp", number=None)
    if op in POINTWISE and len([v for v in node.inputs if v is not None]) == 1:
        function = "swish" if op == "Swish" and attribute(node, "alpha", 1.0) != 1 else POINTWISE[op]
        return form_of(node, Kind.POINTWISE, function=function, number=None)
    if op == "ReduceMean" and axes(node) in ([-1], [last(node)]):
        return form_of(node, Kind.MEAN, keepdim=bool(attribute(node, "keepdims", 1)))
    return read_keep(node)


def _norm(node: ir.Node) -> Form | None:
    """A gain of ones is none: the ops have no other way to say so."""
    source, scale = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if source is None or not is_weight(scale, 1) or (bias is not None and not is_weight(bias, 1)):
        return None
    if attribute(node, "axis", -1) not in (-1, last(node)):
        return None
    is_rms = node.op_type in RMS_NORMS
    if is_rms and bias is not None:
        return None
    return Form(
        Kind.RMS_NORM if is_rms else Kind.LAYER_NORM,
        node,
        node,
        (source,),
        {"epsilon": float(attribute(node, "epsilon", 1e-5))},
        weight=None if is_ones(scale) else (node, 1),
        bias=None if bias is None else (node, 2),
    )


def _gather(node: ir.Node) -> Form | None:
    table, ids = node.inputs[:2]
    axis = int(attribute(node, "axis", 0))
    if is_weight(table, 2) and axis == 0 and table is not None and ids is not None:
        # A table that something reads the other way round is like a linear's weight: see is_linear.
        linears = [slot for slot in slots(table) if slot[0].op_type in ("MatMul", "Gemm") and slot[1] == 1]
        if not any(stored_transposed(slot) for slot in linears):
            return Form(Kind.EMBEDDING, node, node, (ids,), weight=(node, 0))
        return None
    return keep_if_not_last(node, [axis])


def _binary(node: ir.Node) -> Form | None:
    left, right = node.inputs
    if left is None or right is None:
        return None
    first, second = _broadcast_number(left, right), _broadcast_number(right, left)
    if first is not None and second is not None:
        return None
    plain = first if second is None else second
    known = right if first is not None else left
    match node.op_type:
        case "Add" if plain is not None:
            return form_of(node, Kind.POINTWISE, known, function="add", number=plain)
        case "Sub" if second is not None:
            return form_of(node, Kind.POINTWISE, known, function="add", number=-second)
        case "Sub" if first is not None:
            return form_of(node, Kind.POINTWISE, known, function="rsub", number=first)
        case "Mul" if plain is not None:
            return form_of(node, Kind.SCALE, known, number=plain)
        case "Div" if second:
            return form_of(node, Kind.SCALE, known, number=1 / second)
        case "Div" if first is not None:
            return form_of(node, Kind.POINTWISE, known, function="reciprocal" if first == 1 else "rdiv", number=first)
        case "Pow" if second is not None:
            return form_of(node, Kind.POINTWISE, known, function="pow", number=second)
        case "Add" | "Sub":
            return form_of(node, Kind.ADD, *all_inputs(node), subtract=node.op_type == "Sub")
        case "Mul":
            return form_of(node, Kind.MUL, *all_inputs(node))
    return None


def _broadcast_number(value: ir.Value, other: ir.Value) -> float | int | None:
    """The number in ``value`` when combining it leaves the other tensor's shape as it is."""
    tensor = constant(value)
    if tensor is None or len(tensor.shape) > (1 if other.shape is None else max(1, len(other.shape))):
        return None
    return number(value)
