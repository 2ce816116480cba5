"""Weights that stay in their files while a program is converted: the converter folds and compares what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
import torch

from dotresize_fx.offload.lazy_tensor import LazyTensor

# Bytes. What is smaller goes in as it is; a converter merges small tensors that are equal.
LEAST_APART = 1 << 16


@dataclass(frozen=True)
class _Apart:
    lazy: LazyTensor
    zeros: torch.Tensor

    def view(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Callable[[], Any]:
        """What reads the numbers that stand where these zeros do."""
        first = (address - self.zeros.data_ptr()) // self.zeros.itemsize

        def read() -> Any:
            flat = self.lazy.read().cpu().contiguous().reshape(-1).numpy()
            return onnx_ir.Tensor(np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat[first:], shape, strides)))

        return read


class WeightsApart:
    """Puts zeros that take no memory in place of a program's large lazy weights, in its state dict.

    A converter may transpose or slice them, which leaves their memory what it is; what it computes from them would be
    wrong, and is noticed in :meth:`put_back`.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._apart: dict[int, _Apart] = {}
        self._given: set[int] = set()
        self._state: dict[str, Any] = program.state_dict
        made: dict[int, torch.Tensor] = {}
        for key, tensor in self._state.items():
            if isinstance(tensor, LazyTensor) and tensor.nbytes >= LEAST_APART and tensor.dtype is torch.float32:
                if id(tensor) not in made:
                    zeros = torch.from_numpy(np.zeros(tuple(tensor.shape), np.float32))
                    made[id(tensor)] = torch.nn.Parameter(zeros, requires_grad=False)
                    self._apart[zeros.data_ptr()] = _Apart(tensor, zeros)
                self._state[key] = made[id(tensor)]
            elif not isinstance(tensor, LazyTensor):
                self._given.add(tensor.data_ptr())
        self._given |= {tensor.data_ptr() for tensor in program.constants.values() if isinstance(tensor, torch.Tensor)}

    def __bool__(self) -> bool:
        return bool(self._apart)

    def put_back(self, model: onnx_ir.Model) -> bool:
        """Let the initializers read the weights when they are written; False where some were computed from zeros."""
        seen: set[int] = set()
        for value in model.graph.initializers.values():
            tensor = value.const_value
            raw = getattr(tensor, "raw", None)
            if tensor is None or isinstance(raw, LazyTensor):
                continue
            if isinstance(raw, torch.Tensor):
                strides = tuple(step * raw.itemsize for step in raw.stride())
                address, shape = raw.data_ptr(), tuple(raw.shape)
            elif isinstance(raw, np.ndarray):
                address, shape, strides = raw.__array_interface__["data"][0], raw.shape, raw.strides
            else:
                address, shape, strides = 0, (), ()
            begin = self._owner(address)
            if begin is None:
                if address in self._given or tensor.nbytes < LEAST_APART:
                    continue
                return False
            seen.add(begin)
            read = self._apart[begin].view(address, shape, strides)
            value.const_value = onnx_ir.LazyTensor(
                read, dtype=onnx_ir.DataType.FLOAT, shape=onnx_ir.Shape(shape), name=str(value.name)
            )
        return seen == self._apart.keys()

    def _owner(self, address: int) -> int | None:
        for begin, one in self._apart.items():
            if begin <= address < begin + one.zeros.nbytes:
                return begin
        return None
