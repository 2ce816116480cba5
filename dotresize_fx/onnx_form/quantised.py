"""Products with quantised weights, which are read by nobody here: found so that they are reported."""

from __future__ import annotations

import onnx_ir as ir

from dotresize_fx.onnx_form.constants import constant
from dotresize_fx.onnx_form.linears import attribute

# Where the weight is plugged in. A DequantizeLinear's weight is one that a product behind it reads.
_WEIGHTS = {
    "DequantizeLinear": 0, "MatMulInteger": 1, "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1, "MatMulNBits": 1,
    "MatMulBnb4": 1, "MatMulFpQ4": 1, "QAttention": 1, "QLinearMatMul": 3, "QGemm": 3,
}  # fmt: skip


def quantised_weight(node: ir.Node) -> tuple[str, tuple[int, int]] | None:
    """Name of a node's quantised matrix, and its shape as a linear's weight, (out, in); None where it has none.

    What a convolution or a lookup reads is no linear's.
    """
    place = _WEIGHTS.get(node.op_type)
    value = node.inputs[place] if place is not None and len(node.inputs) > place else None
    tensor = constant(value)
    if value is None or tensor is None:
        return None
    if "N" in node.attributes and "K" in node.attributes:  # packed in blocks
        return str(value.name), (int(attribute(node, "N", 0)), int(attribute(node, "K", 0)))
    if len(tensor.shape) != 2:
        return None
    turned = _is_turned(node)
    if turned is None:
        return None
    columns, rows = (int(size) for size in tensor.shape.numpy())
    return str(value.name), (columns, rows) if turned else (rows, columns)


def _is_turned(node: ir.Node) -> bool | None:
    """Whether the matrix is stored as (out, in); None where a DequantizeLinear's is multiplied by nothing."""
    if node.op_type != "DequantizeLinear":
        return bool(attribute(node, "transB", 0))
    for use in node.outputs[0].uses():
        turned, reader, place = False, use.node, use.idx
        if reader.op_type == "Transpose":
            turned = True
            for other in reader.outputs[0].uses():
                reader, place = other.node, other.idx
        if reader.op_type in ("MatMul", "Gemm") and place == 1:
            return turned != bool(attribute(reader, "transB", 0))
    return None
