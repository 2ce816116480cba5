"""The shapes of ONNX ops' outputs by those of their inputs, sizes that are no numbers by name."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from dotresize_fx.onnx_form.axes import axes
from dotresize_fx.onnx_form.constants import integers
from dotresize_fx.onnx_form.linears import attribute
from dotresize_fx.onnx_form.sizes import Sizes, broadcast, quotient, sizes_of, total

Known = Callable[[ir.Value | None], Sizes | None]  # the integers in a value, as far as they are known
Shapes = list[Sizes | None]  # of a node's outputs; empty where they are not known
OPEN = 2**31  # an end of a slice at least as large means the end of the axis
FIRST = (
    "Cast", "CastLike", "Identity", "Dropout", "Neg", "Abs", "Sigmoid", "Tanh", "Relu", "Gelu", "FastGelu",
    "QuickGelu", "Erf", "Exp", "Log", "Sqrt", "Reciprocal", "Softplus", "LeakyRelu", "Elu", "Mish", "HardSwish",
    "HardSigmoid", "Silu", "Swish", "Clip", "Softmax", "LogSoftmax", "IsNaN", "Not", "Cos", "Sin", "CumSum",
    "Trilu", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "RotaryEmbedding",
)  # fmt: skip
BROADCAST = (
    "Add", "Sub", "Mul", "Div", "Pow", "Where", "And", "Or", "Xor", "Equal", "Less", "LessOrEqual", "Greater",
    "GreaterOrEqual", "Max", "Min", "Mod", "Sum", "PRelu", "BitwiseAnd",
)  # fmt: skip
REDUCE = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceSumSquare", "ReduceL2")


def _first(node: ir.Node, known: Known) -> Shapes:
    return [sizes_of(node.inputs[0])]


def _broadcast(node: ir.Node, known: Known) -> Shapes:
    shapes = [sizes_of(value) for value in node.inputs]
    if node.op_type == "Where":
        shapes = [*shapes[1:], shapes[0]]
    return [] if None in shapes else [broadcast(*(shape for shape in shapes if shape is not None))]


def _matmul(node: ir.Node, known: Known) -> Shapes:
    left, right = (sizes_of(value) for value in node.inputs[:2])
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return []
    return (
        [(*broadcast(left[:-2], right[:-2]), left[-2], right[-1])]
        if max(len(left), len(right)) > 2
        else [(left[-2], right[-1])]
    )


def _gemm(node: ir.Node, known: Known) -> Shapes:
    left, right = (sizes_of(value) for value in node.inputs[:2])
    if left is None or right is None:
        return []
    return [(left[1 if attribute(node, "transA", 0) else 0], right[0 if attribute(node, "transB", 0) else 1])]


def _transpose(node: ir.Node, known: Known) -> Shapes:
    source, order = sizes_of(node.inputs[0]), node.attributes.get("perm")
    if source is None:
        return []
    return [tuple(source[axis] for axis in order.as_ints()) if order is not None else source[::-1]]


def _unsqueeze(node: ir.Node, known: Known) -> Shapes:
    source, chosen = sizes_of(node.inputs[0]), axes(node)
    if source is None or chosen is None:
        return []
    rank = len(source) + len(chosen)
    added, rest = {axis % rank for axis in chosen}, iter(source)
    return [tuple(1 if axis in added else next(rest) for axis in range(rank))]


def _squeeze(node: ir.Node, known: Known) -> Shapes:
    source, chosen = sizes_of(node.inputs[0]), axes(node) if len(node.inputs) > 1 or node.attributes else None
    if source is None or chosen is None:
        return []
    gone = {axis % len(source) for axis in chosen} if source else set()
    return [tuple(size for axis, size in enumerate(source) if axis not in gone)]


def _concat(node: ir.Node, known: Known) -> Shapes:
    shapes = [sizes_of(value) for value in node.inputs]
    if None in shapes or not shapes[0]:
        return []
    given = [shape for shape in shapes if shape is not None]
    axis = int(attribute(node, "axis", 0)) % len(given[0])
    whole = total(shape[axis] for shape in given)
    return [(*given[0][:axis], whole, *given[0][axis + 1 :])]


def _split(node: ir.Node, known: Known) -> Shapes:
    source, parts = sizes_of(node.inputs[0]), split_sizes(node)
    if source is None or parts is None:
        return []
    axis = int(attribute(node, "axis", 0)) % len(source)
    return [(*source[:axis], size, *source[axis + 1 :]) for size in parts]


def split_sizes(node: ir.Node) -> list[int] | None:
    """The sizes that a Split of a known one gives; None where it is not known."""
    source, given = sizes_of(node.inputs[0]), node.attributes.get("split")
    if given is not None:
        return list(given.as_ints())
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return integers(node.inputs[1])
    size = source[int(attribute(node, "axis", 0)) % len(source)] if source else None
    if not isinstance(size, int):
        return None
    part, count = -(-size // len(node.outputs)), len(node.outputs)
    return [min(part, size - i * part) for i in range(count)]


def _slice(node: ir.Node, known: Known) -> Shapes:
    source, taken = sizes_of(node.inputs[0]), slices(node)
    if source is None or taken is None:
        return []
    sizes, stated = list(source), sizes_of(node.outputs[0])
    for axis, (start, stop, step) in taken.items():
        size = source[axis]
        if isinstance(size, int):
            sizes[axis] = len(range(*slice(start, stop, step).indices(size)))
        elif (start, stop, step) != (0, None, 1):
            if stated is None or len(stated) != len(source):
                return []
            sizes[axis] = stated[axis]
    return [tuple(sizes)]


def slices(node: ir.Node) -> dict[int, tuple[int, int | None, int]] | None:
    """What a Slice with constant bounds takes, by the axis from the front; an end of None is the axis' end."""
    source = sizes_of(node.inputs[0])
    if source is None or len(node.inputs) < 3:
        return None
    starts, stops, chosen = integers(node.inputs[1]), integers(node.inputs[2]), axes(node)
    steps = integers(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else None
    if starts is None or stops is None or chosen is None or (steps is None and len(node.inputs) > 4):
        return None
    found = {}
    for i, axis in enumerate(chosen):
        found[axis % len(source)] = (starts[i], stops[i] if stops[i] < OPEN else None, steps[i] if steps else 1)
    return found


def _attention(node: ir.Node, known: Known) -> Shapes:
    """(batch, length, heads times the values' size), or heads on an axis of their own."""
    query, value = sizes_of(node.inputs[0]), sizes_of(node.inputs[2]) if len(node.inputs) > 2 else None
    if query is None or value is None or len(query) != len(value) or len(query) not in (3, 4):
        return []
    if len(query) == 4:
        return [(*query[:3], value[3])]
    heads = int(attribute(node, "q_num_heads", attribute(node, "num_heads", 0)))
    shared = int(attribute(node, "kv_num_heads", heads))
    if not heads or not shared or not isinstance(value[2], int):
        return []
    return [(*query[:2], value[2] // shared * heads)]


def _packed_product(node: ir.Node, known: Known) -> Shapes:
    """Of a weight packed in blocks, which says its size in attributes."""
    source, width = sizes_of(node.inputs[0]), int(attribute(node, "N", 0))
    return [(*source[:-1], width)] if source and width else []


def _gather(node: ir.Node, known: Known) -> Shapes:
    source, places = (sizes_of(value) for value in node.inputs[:2])
    if not source or places is None:
        return []
    axis = int(attribute(node, "axis", 0)) % len(source)
    return [(*source[:axis], *places, *source[axis + 1 :])]


def _reduce(node: ir.Node, known: Known) -> Shapes:
    source, chosen = sizes_of(node.inputs[0]), axes(node) if len(node.inputs) > 1 or "axes" in node.attributes else None
    if source is None or not chosen:
        return []
    gone = {axis % len(source) for axis in chosen}
    if attribute(node, "keepdims", 1):
        return [tuple(1 if axis in gone else size for axis, size in enumerate(source))]
    return [tuple(size for axis, size in enumerate(source) if axis not in gone)]


def _reshape(node: ir.Node, known: Known) -> Shapes:
    source, target = sizes_of(node.inputs[0]), known(node.inputs[1])
    if source is None or target is None:
        return []
    copied = not attribute(node, "allowzero", 0)
    if copied and any(size == 0 and i >= len(source) for i, size in enumerate(target)):
        return []
    sizes = [source[i] if size == 0 and copied else size for i, size in enumerate(target)]
    if -1 in sizes:
        others = [size for size in sizes if size != -1]
        sizes[sizes.index(-1)] = quotient(source, others)
    return [tuple(sizes)]


def _expand(node: ir.Node, known: Known) -> Shapes:
    source, target = sizes_of(node.inputs[0]), known(node.inputs[1])
    return [] if source is None or target is None else [broadcast(target, source)]


def _filled(node: ir.Node, known: Known) -> Shapes:
    return [known(node.inputs[0])]


RULES: dict[str, Callable[[ir.Node, Known], Shapes]] = {
    **dict.fromkeys(FIRST, _first),
    **dict.fromkeys(BROADCAST, _broadcast),
    **dict.fromkeys(REDUCE, _reduce),
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Expand": _expand,
    "ConstantOfShape": _filled,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    **dict.fromkeys(("MatMulNBits", "MatMulBnb4"), _packed_product),
    **dict.fromkeys(("Attention", "MultiHeadAttention", "GroupQueryAttention"), _attention),
}
