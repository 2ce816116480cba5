"""ONNX Runtime's values in bfloat16 from numpy's float32 and back: numpy has no such dtype, and torch is not wanted."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

# As ONNX Runtime calls it, and its number in ONNX.
BFLOAT16 = "tensor(bfloat16)"
_NUMBER = 16
Array = np.ndarray[Any, Any]


def to_bfloat16(array: Array) -> Any:
    """Floats of any precision, rounded to the nearest, as a value in the CPU's memory."""
    from onnxruntime import OrtValue

    floats = np.asarray(array, np.float32, order="C")
    bits = floats.view(np.uint32)
    nearest = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16  # of two as near the even one
    halves = np.where(np.isnan(floats), 0x7FC0, nearest).astype(np.uint16)  # what is added would make NaN a number
    return OrtValue.ortvalue_from_numpy_with_onnx_type(halves, _NUMBER)


def to_array(value: Any) -> Array:
    """A value in the CPU's memory as an array: bfloat16 as float32, which has its numbers, the others as they are."""
    array: Array
    if value.element_type() != _NUMBER:
        array = value.numpy()
        return array
    shape = tuple(value.shape())
    count = int(np.prod(shape))
    if not count:
        return np.empty(shape, np.float32)
    halves = np.ctypeslib.as_array((ctypes.c_uint16 * count).from_address(value.data_ptr()))
    array = (halves.astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return array
