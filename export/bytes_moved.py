"""What one run of a graph has to move: the bytes of the weights that it reads, and of the cache in and out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING

import numpy as np
import onnx

from dotresize_fx.export.graph_inputs import InputPlan

if TYPE_CHECKING:
    from dotresize_fx.export.node_profile import ProfiledNode

# By kind, which inputs are tables that rows are picked of: the table itself, and of a quantised one its scales.
_TABLES = {"Gather": (0,), "GatherBlockQuantized": (0, 2, 3)}
_AXES = ("axis", "gather_axis")
# Bits of those types that NumPy gives a byte each.
_PACKED = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}


@dataclass(frozen=True)
class Table:
    """A weight that rows are picked of alone: by the nodes called ``pickers``, of ``rows``."""

    size: int
    rows: int
    pickers: tuple[str, ...]


@dataclass(frozen=True)
class WeightBytes:
    """Of a graph's weights: ``whole`` are the bytes of those that some node reads whole, each counted once."""

    whole: int
    tables: tuple[Table, ...]

    def read(self, nodes: Iterable[ProfiledNode]) -> int | None:
        """Bytes of one run of these nodes; None where a table's nodes do not tell how many rows they picked.

        A row that is picked twice is read twice, until all rows are.
        """
        picked = {node.name: node.picked for node in nodes}
        total = self.whole
        for table in self.tables:
            rows = [picked.get(name, 0) if name else None for name in table.pickers]  # no name: not to be found
            if any(count is None for count in rows):
                return None
            total += ceil(table.size * min(sum(count or 0 for count in rows), table.rows) / table.rows)
        return total


def weight_bytes(graph: onnx.GraphProto) -> WeightBytes:
    """Of the initialisers that nodes read, in branches and loops too."""
    tensors = {tensor.name: tensor for inner in _graphs(graph) for tensor in inner.initializer}
    whole: set[str] = set()
    picks: dict[str, list[str]] = {}
    rows: dict[str, int] = {}
    for node in (node for inner in _graphs(graph) for node in inner.node):
        tables = _TABLES.get(node.op_type, ())
        axis = next((attribute.i for attribute in node.attribute if attribute.name in _AXES), 0)
        for index, name in enumerate(node.input):
            if (tensor := tensors.get(name)) is None:
                continue
            if index in tables and tensor.dims and tensor.dims[axis]:
                picks.setdefault(name, []).append(node.name)
                rows[name] = min(rows.get(name, tensor.dims[axis]), tensor.dims[axis])
            else:
                whole.add(name)
    return WeightBytes(
        sum(_size(tensors[name]) for name in whole),
        tuple(Table(_size(tensors[name]), rows[name], tuple(by)) for name, by in picks.items() if name not in whole),
    )


def cache_bytes(plans: Sequence[InputPlan], batch: int, length: int, past: int) -> int:
    """Of keys and values: what goes in, and what comes out with the new tokens' own."""
    total = 0
    for plan in plans:
        if plan.cache:
            grown = 0 if plan.present is None else prod(plan.shape(batch, length, past + length))
            total += np.dtype(plan.dtype).itemsize * (prod(plan.shape(batch, length, past)) + grown)
    return total


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _size(tensor: onnx.TensorProto) -> int:
    whole: int = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    bits = _PACKED.get(onnx.TensorProto.DataType.Name(tensor.data_type), whole)
    size: int = ceil(prod(tensor.dims) * bits / 8)
    return size
