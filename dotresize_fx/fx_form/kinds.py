"""What each torch.fx node is in the neutral view: the one table from aten ops to kinds."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch

from dotresize_fx.fx_form.axes import axes_form
from dotresize_fx.fx_form.channelwise import CHANNELS, keeps_channels_apart
from dotresize_fx.graph import Kind

aten = torch.ops.aten

POINTWISE: dict[Any, str] = {
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
    aten.relu.default: "relu",
    aten.relu6.default: "relu6",
    aten.tanh.default: "tanh",
    aten.sigmoid.default: "sigmoid",
    aten.erf.default: "erf",
    aten.exp.default: "exp",
    aten.softplus.default: "softplus",
    aten.leaky_relu.default: "leaky_relu",
    aten.elu.default: "elu",
    aten.mish.default: "mish",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.hardtanh.default: "hardtanh",
    aten.clamp.default: "clamp",
    aten.clamp_min.default: "clamp",
    aten.clamp_max.default: "clamp",
    aten.abs.default: "abs",
    aten.square.default: "square",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
    aten.reciprocal.default: "reciprocal",
    aten.pow.Tensor_Scalar: "pow",
    aten.rsub.Scalar: "rsub",
    aten.expm1.default: "expm1",
    aten.log.default: "log",
    aten.log1p.default: "log1p",
    aten.log_sigmoid.default: "log_sigmoid",
    aten.sin.default: "sin",
    aten.cos.default: "cos",
    aten.gt.Scalar: "gt",
    aten.ge.Scalar: "ge",
    aten.lt.Scalar: "lt",
    aten.le.Scalar: "le",
    aten.min.other: "minimum",
    aten.max.other: "maximum",
    aten.minimum.default: "minimum",
    aten.maximum.default: "maximum",
}
SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar}
CASTS = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
}
_COPIES = {aten.dropout.default, aten.contiguous.default, aten.clone.default}
KEEP = CASTS | _COPIES | {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}
# Ops that keep the last dimension when the one they act on (argument 1) is another.
KEEP_UNLESS_LAST = {
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.index_select.default,
}
# Of a tensor over some axes, and however the square root is corrected.
SPREADS = {aten.std.dim, aten.std.correction, aten.var.dim, aten.var.correction}
FLATTEN = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
# Put tensors together, or one in another's shape.
JOINS = {aten.cat.default, aten.concatenate.default, aten.stack.default, aten.expand_as.default}
RESHAPE = FLATTEN | {
    aten.transpose.int,
    aten.permute.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.view_as.default,
    aten.t.default,
}
# What may stand between the weights of attention and the values that they mix, which is linear in the values anyhow.
_BEHIND_SOFTMAX = CASTS | _COPIES | FLATTEN | {aten.slice.Tensor, aten.masked_fill.Scalar}
_PLAIN_NUMBERS = (int, float)
# Products of rows, ordered by expert, with each expert's own matrix: by name, since some are registered by others.
GROUPED = {"transformers.grouped_mm_fallback.default", "aten._grouped_mm.default"}
# Of as many matrices with each expert's own: every expert sees all rows.
BATCHED = "aten.bmm.default"


# Of a tensor with a matrix.
PRODUCTS = {aten.matmul.default, aten.mm.default}
_TURNS = {aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default}


def matrix_of(node: Any, parameters: Container[str]) -> torch.fx.Node | None:
    """The placeholder of a matrix that is given as it is stored, or turned round by an op of its own."""
    if not isinstance(node, torch.fx.Node) or len(node.meta["val"].shape) != 2:
        return None
    turned = node.op != "placeholder" and node.target in _TURNS and axes_form(node).get("order", (1, 0)) == (1, 0)
    source = node.args[0] if turned else node
    return source if isinstance(source, torch.fx.Node) and source.name in parameters else None


def _mixes_heads(node: torch.fx.Node) -> bool:
    """Whether it multiplies weights of attention, (batch, heads, length, keys) or those two joined, with values."""
    shape = node.meta["val"].shape
    if node.target is aten.bmm.default:
        return not isinstance(shape[0], int) and _comes_from_softmax(node.args[0])
    return len(shape) == 4 and isinstance(shape[1], int) and _comes_from_softmax(node.args[0])


def _comes_from_softmax(node: Any) -> bool:
    """Whether a value is a softmax's over the last axis, cast, copied, reshaped, partly hidden or cut short at most."""
    while isinstance(node, torch.fx.Node) and node.target in _BEHIND_SOFTMAX:
        node = node.args[0]
    if not isinstance(node, torch.fx.Node) or node.target not in (aten.softmax.int, aten._softmax.default):
        return False
    return node.args[1] in (-1, len(node.meta["val"].shape) - 1)


def _width(node: torch.fx.Node) -> Any:
    shape = node.meta["val"].shape
    return shape[-1] if len(shape) else None


def is_lookup(node: torch.fx.Node, parameters: Container[str]) -> bool:
    """Whether rows of a table are looked up by index: an embedding, or the bias of the expert a row was routed to."""
    source: Any = node.args[0]
    places: Any = node.args[1]
    stored = isinstance(source, torch.fx.Node) and source.name in parameters and len(source.meta["val"].shape) == 2
    return stored and len(places) == 1 and isinstance(places[0], torch.fx.Node)


def is_turned_weight(node: torch.fx.Node, parameters: Container[str]) -> bool:
    """Whether this only turns the experts' weights, (experts, out, in), round for the products that read it."""
    source = node.args[0] if node.args else None
    axes: Any = node.args[1:3]
    turns = node.target is aten.transpose.int and sorted(axis % 3 for axis in axes) == [1, 2]
    stored = isinstance(source, torch.fx.Node) and source.name in parameters and len(source.meta["val"].shape) == 3
    return turns and stored and all(_multiplies(user, node) for user in node.users)


def _multiplies(node: torch.fx.Node, weight: torch.fx.Node) -> bool:
    """Whether this is a grouped or batched product of rows with that weight."""
    return str(node.target) in (*GROUPED, BATCHED) and node.args[1] is weight and node.args[0] is not weight


def _expert_weight(node: torch.fx.Node, parameters: Container[str]) -> torch.fx.Node | None:
    """The placeholder of a grouped or batched product's weight."""
    weight: Any = node.args[1]
    if not isinstance(weight, torch.fx.Node):
        return None
    if weight.op != "placeholder":
        return weight.args[0] if is_turned_weight(weight, parameters) else None  # type: ignore[return-value]
    return weight if weight.name in parameters else None


def classify(node: torch.fx.Node, parameters: Container[str]) -> tuple[Kind, dict[str, Any]]:
    """The kind of a call node and the attributes that go with it, what it does to axes among them.

    ``parameters`` are names of placeholders.
    """
    kind, attributes = _classify(node, parameters)
    return kind, attributes | axes_form(node)


def _classify(node: torch.fx.Node, parameters: Container[str]) -> tuple[Kind, dict[str, Any]]:
    target, args = node.target, node.args
    if target in (aten.linear.default, aten.embedding.default):
        weight = args[1] if target is aten.linear.default else args[0]
        bias = args[2] if target is aten.linear.default and len(args) > 2 else None
        if all(isinstance(p, torch.fx.Node) and p.name in parameters for p in (weight, bias) if p):
            return (Kind.LINEAR if target is aten.linear.default else Kind.EMBEDDING), {}
    if str(target) in (*GROUPED, BATCHED) and _expert_weight(node, parameters) is not None:
        return Kind.EXPERTS, {}
    if target is aten.addmm.default and len(node.kwargs) == 0:
        return Kind.ADDMM, {}
    if target in PRODUCTS and matrix_of(node.args[1], parameters) is not None:
        return Kind.ADDMM, {"bare": True}
    if (target in PRODUCTS or target is aten.bmm.default) and _mixes_heads(node):
        return Kind.ATTENTION, {"scale": None, "grouped": False, "mixes": True}
    if target is aten.where.self and all(_width(a) == _width(node) for a in args if isinstance(a, torch.fx.Node)):
        return Kind.POINTWISE, {"function": "where", "number": None}
    if target in (aten.rms_norm.default, aten.layer_norm.default) and len(args[1]) == 1:  # type: ignore[arg-type]
        if any(isinstance(p, torch.fx.Node) and p.name not in parameters for p in args[2:4]):
            return Kind.OTHER, {}  # a computed gain (one plus a parameter) is none that can be folded
        is_rms = target is aten.rms_norm.default
        epsilon = args[3 if is_rms else 4] if len(args) > (3 if is_rms else 4) else None
        default = torch.finfo(torch.float32).eps if is_rms else 1e-5
        chosen = epsilon if isinstance(epsilon, float) else default
        return (Kind.RMS_NORM if is_rms else Kind.LAYER_NORM), {"epsilon": chosen}
    if target in SUMS:
        return _classify_sum(node)
    if target is aten.mul.Tensor:
        return (Kind.MUL, {}) if isinstance(args[1], torch.fx.Node) else (Kind.SCALE, {"number": args[1]})
    if target is aten.div.Tensor and isinstance(args[1], _PLAIN_NUMBERS):
        return Kind.SCALE, {"number": 1 / args[1]}
    if target is aten.mul.Scalar or target is aten.neg.default:
        return Kind.SCALE, {"number": args[1] if len(args) > 1 else -1}
    if target is aten.div.Tensor and isinstance(args[1], torch.fx.Node):
        return Kind.POINTWISE, {"function": "div", "number": None}
    if target in POINTWISE:
        return Kind.POINTWISE, {
            "function": POINTWISE[target],
            "number": args[1] if len(args) > 1 and not isinstance(args[1], torch.fx.Node) else None,
        }
    if target is aten.dropout.default and args[1] and args[2]:
        return Kind.OTHER, {}  # traced in training mode: random, and not to be dropped
    if target in CASTS and not (_same_dtype(node) or node.meta["val"].dtype.is_floating_point):
        return Kind.OTHER, {}  # a cast to integers cuts the fraction off
    if target in KEEP:
        copies = target in (aten.clone.default, aten.contiguous.default)
        cast = target in CASTS
        return Kind.KEEP, {"no_op": not copies and _same_dtype(node), "cast": cast, "widens": cast and _widens(node)}
    if target in KEEP_UNLESS_LAST:
        return (Kind.OTHER if _acts_on_last(node) else Kind.KEEP), {"no_op": False}
    if target is aten.index.Tensor and is_lookup(node, parameters):
        return Kind.EMBEDDING, {}
    if target is aten.index.Tensor and len(args[1]) < _rank(node):  # type: ignore[arg-type]
        return Kind.KEEP, {"no_op": False, "moves_rows": True}
    if target is aten.sum.dim_IntList and not _sums_last(node):
        return Kind.KEEP, {"no_op": False, "moves_rows": True, "sums_rows": True}
    if target is aten.linalg_vector_norm.default and len(args) > 2 and not _sums_last(node, 2):
        return Kind.POINTWISE, {"function": "vector_norm", "number": None}
    if target is aten.mean.dim and not _sums_last(node):
        return Kind.KEEP, {"no_op": False, "moves_rows": True}
    if target in JOINS and _joins_others(node):
        return Kind.KEEP, {"no_op": False, "joins": True}
    if target is aten.expand.default and _keeps_width(node):
        return Kind.KEEP, {"no_op": False, "reshape": True}
    if target is aten.repeat.default and _keeps_width(node):
        return Kind.KEEP, {"no_op": False, "moves_rows": True}
    if target is aten.mean.dim and list(args[1]) in ([-1], [_rank(node) - 1]):  # type: ignore[arg-type]
        return Kind.MEAN, {"keepdim": len(args) > 2 and bool(args[2])}
    if keeps_channels_apart(node, parameters):
        return Kind.CHANNELWISE, {"channels": CHANNELS}
    if target in SPREADS and list(args[1]) in ([-1], [_rank(node) - 1]):  # type: ignore[arg-type]
        return Kind.OTHER, {"over_width": True}
    if target in FLATTEN and _keeps_width(node):
        return Kind.KEEP, {"no_op": False, "reshape": True}
    if target in RESHAPE:
        return Kind.RESHAPE, {"flattens": target in (aten.flatten.using_ints, aten.unflatten.int)}
    if target is aten.scaled_dot_product_attention.default:
        grouped = bool(node.kwargs.get("enable_gqa", False))
        return Kind.ATTENTION, {"scale": node.kwargs.get("scale"), "grouped": grouped}
    return Kind.OTHER, {}


def _joins_others(node: torch.fx.Node) -> bool:
    """Whether tensors of one last axis are put together along another, or given one another's shape."""
    if any(_width(source) != _width(node) for source in node.all_input_nodes if isinstance(_width(source), int)):
        return False
    rank = len(node.meta["val"].shape)
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return node.target is aten.expand_as.default or (isinstance(axis, int) and axis % rank != rank - 1)


def _classify_sum(node: torch.fx.Node) -> tuple[Kind, dict[str, Any]]:
    if node.kwargs or len(node.args) > 2:  # alpha, a factor on the second term
        return Kind.OTHER, {}
    subtract = node.target in (aten.sub.Tensor, aten.sub.Scalar)
    term: Any = node.args[1]
    if isinstance(term, torch.fx.Node):
        return Kind.ADD, {"subtract": subtract}
    if term == 0 and _same_dtype(node):
        return Kind.KEEP, {"no_op": True, "cast": False}
    return Kind.POINTWISE, {"function": "add", "number": -term if subtract else term}


def _keeps_width(node: torch.fx.Node) -> bool:
    """A reshape between tensors of one last dimension joins or splits the others only."""
    source = node.args[0]
    before = source.meta["val"].shape if isinstance(source, torch.fx.Node) else ()
    after = node.meta["val"].shape
    return bool(before and after and isinstance(after[-1], int) and before[-1] == after[-1])


def _same_dtype(node: torch.fx.Node) -> bool:
    source = node.args[0]
    return isinstance(source, torch.fx.Node) and bool(source.meta["val"].dtype == node.meta["val"].dtype)


def _widens(node: torch.fx.Node) -> bool:
    """Whether a cast keeps every number, as bfloat16 to float32 does."""
    source = node.args[0]
    if not isinstance(source, torch.fx.Node):
        return False
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    return bool(torch.promote_types(before, after) == after)


def _rank(node: torch.fx.Node) -> int:
    source = node.args[0]
    return len(source.meta["val"].shape) if isinstance(source, torch.fx.Node) else 0


def _sums_last(node: torch.fx.Node, position: int = 1) -> bool:
    """Whether a sum over the axes that this argument names is over the last one, or over all."""
    axes: Any = node.args[position]
    return not axes or _rank(node) - 1 in {axis % _rank(node) for axis in axes}


def _acts_on_last(node: torch.fx.Node) -> bool:
    dim = node.args[1] if len(node.args) > 1 else 0
    rank = _rank(node) + (node.target is aten.unsqueeze.default)
    return not isinstance(dim, int) or dim % rank == rank - 1
