"""What each ONNX op is in the neutral view: its kind, its activations and where its parameters are plugged in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype

from dotresize_fx.graph import Kind
from dotresize_fx.onnx_form.attention_ops import read_attention_op, read_rotary_op
from dotresize_fx.onnx_form.axes import axes, keeps_width, last, sees_width
from dotresize_fx.onnx_form.constants import constant, is_ones, is_weight, number
from dotresize_fx.onnx_form.linears import Slot, attribute, bias_slot, linear_core, slots, stored_transposed
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


@dataclass(frozen=True)
class Form:
    """A node read once, or one output of a Split.

    ``core`` does the work; ``last`` has the output (the Add of a bias, else ``core``), at ``index`` among its own.
    """

    kind: Kind
    core: ir.Node
    last: ir.Node
    inputs: tuple[ir.Value, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    weight: Slot | None = None
    bias: Slot | None = None
    index: int = 0

    @property
    def output(self) -> ir.Value:
        """What the op computes."""
        return self.last.outputs[self.index]


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
    return Form(kind, node, node, _all_inputs(node), {} if quantised is None else {"quantised": quantised})


def _read_known(node: ir.Node) -> Form | None:
    op = node.op_type
    if not node.inputs or node.inputs[0] is None:
        return None
    if op in NORMS:
        return _norm(node)
    if op == "Gather":
        return _gather(node)
    if op == "Shape":
        return Form(Kind.OTHER, node, node, _all_inputs(node) if sees_width(node) else ())
    if op in ("Add", "Sub", "Mul", "Div", "Pow"):
        return _binary(node)
    if op == "Neg":
        return _form(node, Kind.SCALE, number=-1)
    if op == "Clip":
        return _form(node, Kind.POINTWISE, function="clamp", number=None)
    if op in POINTWISE and len([v for v in node.inputs if v is not None]) == 1:
        function = "swish" if op == "Swish" and attribute(node, "alpha", 1.0) != 1 else POINTWISE[op]
        return _form(node, Kind.POINTWISE, function=function, number=None)
    if op == "ReduceMean" and axes(node) in ([-1], [last(node)]):
        return _form(node, Kind.MEAN, keepdim=bool(attribute(node, "keepdims", 1)))
    return _keep(node)


def _form(node: ir.Node, kind: Kind, *inputs: ir.Value, **attributes: Any) -> Form:
    first = node.inputs[0]
    assert first is not None
    return Form(kind, node, node, inputs or (first,), attributes)


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
    return _keep_if_not_last(node, [axis])


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
            return _form(node, Kind.POINTWISE, known, function="add", number=plain)
        case "Sub" if second is not None:
            return _form(node, Kind.POINTWISE, known, function="add", number=-second)
        case "Sub" if first is not None:
            return _form(node, Kind.POINTWISE, known, function="rsub", number=first)
        case "Mul" if plain is not None:
            return _form(node, Kind.SCALE, known, number=plain)
        case "Div" if second:
            return _form(node, Kind.SCALE, known, number=1 / second)
        case "Div" if first is not None:
            return _form(node, Kind.POINTWISE, known, function="reciprocal" if first == 1 else "rdiv", number=first)
        case "Pow" if second is not None:
            return _form(node, Kind.POINTWISE, known, function="pow", number=second)
        case "Add" | "Sub":
            return _form(node, Kind.ADD, *_all_inputs(node), subtract=node.op_type == "Sub")
        case "Mul":
            return _form(node, Kind.MUL, *_all_inputs(node))
    return None


def _broadcast_number(value: ir.Value, other: ir.Value) -> float | int | None:
    """The number in ``value`` when combining it leaves the other tensor's shape as it is."""
    tensor = constant(value)
    if tensor is None or len(tensor.shape) > (1 if other.shape is None else max(1, len(other.shape))):
        return None
    return number(value)


def _keep(node: ir.Node) -> Form | None:
    output = node.outputs[0]
    # The graph's own output keeps its name, so an op that only passes it on has to stay.
    free = not output.is_graph_output()
    match node.op_type:
        case "Identity":
            return _form(node, Kind.KEEP, no_op=free, cast=False)
        case "Dropout":
            training = node.inputs[2] if len(node.inputs) > 2 else None
            tensor = constant(training)
            if training is not None and (tensor is None or tensor.numpy().any()):
                return None
            return _form(node, Kind.KEEP, no_op=free, cast=False)
        case "Cast" | "CastLike":
            before, after = _float_dtype(node.inputs[0]), _float_dtype(output)
            if after is None:
                return None  # unknown, or a cast to integers, which cuts the fraction off
            widens = before is not None and torch.promote_types(before, after) == after
            return _form(node, Kind.KEEP, no_op=free and before == after, cast=True, widens=widens)
        case "Slice" | "Unsqueeze" | "Squeeze":
            chosen = axes(node)
            return None if chosen is None else _keep_if_not_last(node, chosen)
        case "Split":
            return _keep_if_not_last(node, [int(attribute(node, "axis", 0))])
        case "Reshape" | "Expand" if keeps_width(node):
            return _form(node, Kind.KEEP, no_op=False, reshape=True)
        case "Concat" if _joins_others(node):
            return Form(Kind.KEEP, node, node, _all_inputs(node), {"no_op": False, "joins": True})
        case "Where":
            widths = {value.shape[-1] if value is not None and value.shape else None for value in node.inputs}
            if len(widths) == 1 and None not in widths:
                return Form(Kind.POINTWISE, node, node, _all_inputs(node), {"function": "where", "number": None})
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


def _keep_if_not_last(node: ir.Node, chosen: list[int]) -> Form | None:
    """KEEP when none of the axes is the last: of the output for Unsqueeze, of the input for the others."""
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    rank = len(source.shape) + (len(chosen) if node.op_type == "Unsqueeze" else 0)
    if rank == 0 or any(axis % rank == rank - 1 for axis in chosen):
        return None
    return _form(node, Kind.KEEP, no_op=False)


def has_second_output(node: ir.Node) -> bool:
    """Whether anything reads another output than the first."""
    return any(output.uses() or output.is_graph_output() for output in node.outputs[1:])


def _all_inputs(node: ir.Node) -> tuple[ir.Value, ...]:
    """Inputs, and what the bodies of If, Loop and Scan read of the graph around them."""
    found = [value for value in node.inputs if value is not None]
    for body in bodies(node):
        inner = [value for user in body.all_nodes() for value in user.inputs if value is not None]
        found += [value for value in (*inner, *body.outputs) if value.graph is node.graph]
    return tuple(dict.fromkeys(found))


def bodies(node: ir.Node) -> list[ir.Graph]:
    """The graphs among the node's attributes."""
    found: list[ir.Graph] = []
    for given in node.attributes.values():
        if given.type == ir.AttributeType.GRAPH:
            found.append(given.as_graph())
        elif given.type == ir.AttributeType.GRAPHS:
            found.extend(given.as_graphs())
    return found
