"""Rotary tables for every sequence, as ONNX's RotaryEmbedding wants them, where all sequences share one."""

from __future__ import annotations

import onnx_ir
from onnx_ir import tape


def fit_rotary_tables(model: onnx_ir.Model) -> int:
    """Repeat tables (1, length, size / 2) for the sequences of what they rotate; returns how many tables.

    With tables of one sequence alone ONNX Runtime refuses to run a batch of several.
    """
    graph = model.graph
    fitted: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for node in [node for node in graph if node.op_type == "RotaryEmbedding" and node.domain == ""]:
        rotated = node.inputs[0]
        if rotated is None or len(node.inputs) != 3:  # positions pick rows of a table
            continue
        for index, table in enumerate(node.inputs[1:3], start=1):
            if table is None or table.shape is None or len(table.shape) != 3 or table.shape[0] != 1:
                continue
            if table not in fitted:
                written = tape.Tape(graph)
                batch = written.op("Shape", [rotated], attributes={"start": 0, "end": 1})
                rest = written.op("Shape", [table], attributes={"start": 1})
                size = written.op("Concat", [batch, rest], attributes={"axis": 0})
                fitted[table] = written.op("Expand", [table, size])
                batches = rotated.shape[0] if rotated.shape is not None else None
                fitted[table].shape = onnx_ir.Shape([batches, *table.shape[1:]])
                fitted[table].type = table.type
                graph.insert_before(node, written.nodes)
            node.replace_input_with(index, fitted[table])
    return len(fitted)
