"""One value of an ONNX graph in place of another."""

from __future__ import annotations

import onnx_ir


def replace_value(old: onnx_ir.Value, new: onnx_ir.Value) -> None:
    """Let ``new`` be what ``old`` was: read by the same nodes, put out by the graph, with its name, shape and type."""
    new.shape, new.type, name = old.shape, old.type, old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}_replaced", name
