"""Edits between an attention and its linears that the ONNX form lacks: it shows no attention regions yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from dotresize_fx.graph import Op, Value


class NoHeadEdits:
    """Each of these edits raises NotImplementedError and says why."""

    def resize_axes(self, op: Op, sizes: Mapping[int, int]) -> None:
        raise NotImplementedError(f"{op.name}: heads of an ONNX graph cannot be resized yet")

    def resize_slice(self, op: Op, start: int, stop: int | None) -> None:
        raise NotImplementedError(f"{op.name}: a slice of an ONNX graph cannot be resized yet")

    def insert_gather(self, source: Value, indices: torch.Tensor, *, users: Iterable[Op], name: str = "gathered") -> Op:
        raise NotImplementedError(f"{source.name}: tables of an ONNX graph cannot be gathered yet")

    def set_attention_scale(self, op: Op, scale: float) -> None:
        raise NotImplementedError(f"{op.name}: the scale of an ONNX graph's attention cannot be set yet")

    def redirect(self, op: Op, value: Value) -> None:
        raise NotImplementedError(f"{op.name}: packed linears of an ONNX graph cannot be split yet")
