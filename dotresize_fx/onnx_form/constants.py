"""Constants of an ONNX graph, as tensors, numbers and lists of integers, and their way to torch and back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype

READ = "dotresize_fx.constant"  # in a Constant node's meta: its tensor


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind an initializer or a Constant node's output; None for anything else.

    An initializer that is also a graph input is only a default that a caller may override, so it counts as an
    input (``onnx_ir.passes.common.RemoveInitializersFromInputsPass`` makes such a model's weights its own).
    """
    if value is None or value.is_graph_input():
        return None
    producer = value.producer()
    if producer is None:
        return value.const_value if value.is_initializer() else None
    if not is_constant_node(producer):
        return None
    if READ not in producer.meta:  # looked at again and again, and never edited
        producer.meta[READ] = ir.convenience.get_const_tensor(value)
    found: ir.TensorProtocol | None = producer.meta[READ]
    return found


def is_constant_node(node: ir.Node) -> bool:
    """Whether the node holds a constant of the graph."""
    return node.op_type == "Constant" and node.domain == "" and len(node.outputs) == 1


def number(value: ir.Value | None) -> float | int | None:
    """The number in a constant of one element and at most one dimension, or of as many as broadcasting ignores."""
    tensor = constant(value)
    if tensor is None or tensor.size != 1 or not _is_numeric(tensor.dtype):
        return None
    found: float | int = tensor.numpy().reshape(()).item()
    return found


def integers(value: ir.Value | None) -> list[int] | None:
    """The elements of a constant integer or boolean tensor (axes, a shape); None when it is computed or absent."""
    tensor = constant(value)
    if tensor is None or not (tensor.dtype.is_integer() or tensor.dtype == ir.DataType.BOOL):
        return None
    return [int(element) for element in tensor.numpy().reshape(-1)]


def is_weight(value: ir.Value | None, rank: int) -> bool:
    """Whether ``value`` is a constant floating-point tensor of this rank."""
    tensor = constant(value)
    return tensor is not None and len(tensor.shape) == rank and tensor.dtype.is_floating_point()


def is_ones(value: ir.Value | None) -> bool:
    """Whether every element is exactly one."""
    tensor = constant(value)
    return tensor is not None and bool(np.all(tensor.numpy() == 1))


def to_torch(tensor: ir.TensorProtocol) -> torch.Tensor:
    """The same values and dtype (bfloat16 and float16 too) as a torch tensor; the memory is shared where it can be.

    Raises:
        TypeError: torch has no such dtype (packed 4-bit integers, strings).
    """
    if isinstance(tensor, TorchTensor):
        return tensor.raw
    dtype = to_torch_dtype(tensor.dtype)
    array = np.ascontiguousarray(tensor.numpy())
    if not array.flags.writeable:  # torch has no read-only tensors
        array = array.copy()
    return torch.from_numpy(array.view(np.uint8).reshape(-1)).view(dtype).reshape(tuple(tensor.shape.numpy()))


def from_torch(tensor: torch.Tensor, name: str | None) -> ir.TensorProtocol:
    """The tensor as a constant of this name, without copying what is contiguous already."""
    return TorchTensor(tensor.detach().contiguous(), name=name)


def _is_numeric(dtype: ir.DataType) -> bool:
    return dtype.is_floating_point() or dtype.is_integer()
