"""Nodes that sum products of activations over a batch's rows, so that only the sums leave ONNX Runtime.

Rows that a mask leaves out count as zeros, whatever they hold. Products are of float32; what is summed over batches is
summed in float64 (:class:`dotresize_fx.gram.GramAccumulator`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

# (rows,), 1.0 where a row counts; of one element where all do. A value of other rows than it has is taken whole.
ROW_MASK = "dotresize_fx.row_mask"
_PREFIX = "dotresize_fx.sum"
Sums = dict[str, np.ndarray[Any, Any]]


class GramNodes:
    """Sums by key: what :meth:`add` was asked for, as nodes that a piece of a graph ends in.

    ``reads`` are values of the graph, or such as are fed beside it, that the sums take.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.reads: list[str] = []
        self.outputs: list[str] = []
        self._keys: dict[str, str] = {}
        self._rows: dict[str, tuple[str, str]] = {}
        self._counter = 0

    def add(self, key: str, value: str, others: Mapping[str, Sequence[tuple[str, float]]], *, ones: bool) -> None:
        """Sum x.T @ x over the rows x of ``value``, with a constant one beside them where ``ones``; x.T @ y and the
        square of y for each of ``others``, which are (value, factor) pairs that are added up; and count the rows.

        They are read as ``key``/gram, /tokens, /cross/NAME and /energy/NAME.
        """
        rows, counted = self.rows(value)
        x = rows
        if ones:
            x = self.node("Concat", [rows, self.node("Cast", [counted], to=onnx.TensorProto.FLOAT)], axis=1)
        self._output(f"{key}/gram", self.node("Gemm", [x, x], transA=1))
        number = self.node("Cast", [counted], to=onnx.TensorProto.INT64)
        self._output(f"{key}/tokens", self.node("ReduceSum", [number], keepdims=0))
        for name, parts in others.items():
            y = self._added(parts)
            y = self.node("Where", [counted, y, self.constant(np.float32(0))])
            self._output(f"{key}/cross/{name}", self.node("Gemm", [x, y], transA=1))
            self._output(f"{key}/energy/{name}", self.square(y))

    def take(self, key: str, name: str) -> None:
        """Let a value that nodes of :meth:`node` compute leave as ``key``."""
        self._output(key, name)

    def square(self, name: str) -> str:
        """The sum of all squares, in float64."""
        exact = self.node("Cast", [name], to=onnx.TensorProto.DOUBLE)
        return self.node("ReduceSumSquare", [exact], keepdims=0)

    def rows(self, value: str) -> tuple[str, str]:
        """(rows (n, width) in float32, zeros where one does not count; (n, 1), whether it does)."""
        if value not in self._rows:
            flat = self.flat(value)
            shape = self.node("Shape", [flat])
            count = self.node("Gather", [shape, self.constant(np.int64(0))], axis=0)
            masked = self.node("Gather", [self.node("Shape", [ROW_MASK]), self.constant(np.int64(0))], axis=0)
            places = self.node("Range", [self.constant(np.int64(0)), count, self.constant(np.int64(1))])
            taken = self.node("Gather", [ROW_MASK, self.node("Mod", [places, masked])], axis=0)
            real = self.node("Cast", [taken], to=onnx.TensorProto.BOOL)
            real = self.node("Or", [real, self.node("Not", [self.node("Equal", [count, masked])])])
            column = self.node("Reshape", [real, self.constant(np.array([-1, 1]))])
            rows = self.node("Where", [column, flat, self.constant(np.float32(0))])
            self._rows[value] = rows, column
        return self._rows[value]

    def flat(self, value: str) -> str:
        """(rows, width) in float32, all of them."""
        if value not in self.reads:
            self.reads.append(value)
        return self.node("Flatten", [self.node("Cast", [value], to=onnx.TensorProto.FLOAT)], axis=-1)

    def node(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node of ONNX's own domain; the name of its output."""
        output = self._fresh()
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def constant(self, array: Any) -> str:
        """The name of a constant."""
        name = self._fresh()
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def read(self, found: Mapping[str, Any]) -> Sums:
        """Of a run's outputs, the sums by their keys."""
        return {key: found[name].numpy() for key, name in self._keys.items()}

    def _added(self, parts: Sequence[tuple[str, float]]) -> str:
        total = ""
        for value, factor in parts:
            flat = self.flat(value)
            term = flat if factor == 1 else self.node("Mul", [flat, self.constant(np.float32(factor))])
            total = term if not total else self.node("Add", [total, term])
        return total

    def _output(self, key: str, name: str) -> None:
        self.outputs.append(name)
        self._keys[key] = name

    def _fresh(self) -> str:
        self._counter += 1
        return f"{_PREFIX}.{self._counter}"
