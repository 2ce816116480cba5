"""Tensors as ONNX Runtime's own values and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

# onnxruntime.OrtValue, which comes with an extra.
RuntimeValue = Any


def to_runtime(tensor: torch.Tensor, device: str = "cpu") -> RuntimeValue:
    """The tensor for the runtime; on the CPU both share the memory."""
    tensor = tensor.detach().to("cpu").contiguous()
    if tensor.dtype is torch.bfloat16:
        return _value(tensor.view(torch.int16).numpy().view(np.uint16), ir.DataType.BFLOAT16, device)
    return _value(tensor.numpy(), None, device)


def constant_to_runtime(tensor: ir.TensorProtocol, device: str = "cpu") -> RuntimeValue:
    """A constant of the model likewise; one in a file stays there until it is read."""
    array = np.ascontiguousarray(tensor.numpy())
    if tensor.dtype == ir.DataType.BFLOAT16:
        return _value(array.view(np.uint16), ir.DataType.BFLOAT16, device)
    return _value(array, None, device)


def _value(array: np.ndarray[Any, Any], kind: ir.DataType | None, device: str) -> RuntimeValue:
    from onnxruntime import OrtValue

    if not array.size:
        device = "cpu"  # what is empty has no address on a device
    if kind is None:
        return OrtValue.ortvalue_from_numpy(array, device, 0)
    if device == "cpu":
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array, int(kind))
    # numpy has no bfloat16, and ONNX Runtime no copy to a device but of numpy's arrays.
    copied = torch.from_numpy(array.view(np.int16).copy()).to(device).view(torch.bfloat16)
    torch.cuda.current_stream().synchronize()  # ONNX Runtime reads it on a stream of its own
    return OrtValue.from_dlpack(copied)


def from_runtime(value: RuntimeValue) -> torch.Tensor:
    """An output of the model as a tensor on the CPU."""
    if value.element_type() == int(ir.DataType.BFLOAT16):
        return torch.utils.dlpack.from_dlpack(value._ortvalue).clone().cpu()
    return torch.from_numpy(value.numpy())


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor as an array; bfloat16, which numpy lacks, as float32, whose numbers have it among them."""
    array: np.ndarray[Any, Any] = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array
