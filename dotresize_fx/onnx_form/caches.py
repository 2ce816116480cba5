"""A graph's cache: keys and values of earlier tokens that it reads, and hands on with those of its own tokens."""

from __future__ import annotations

import onnx_ir as ir

from dotresize_fx.onnx_form.linears import attribute


def find_caches(graph: ir.Graph) -> dict[str, str]:
    """Outputs that are an input with more tokens behind it, (batch, heads, length, size), and that input; by name."""
    found = {}
    for output in graph.outputs:
        node = output.producer()
        past = node.inputs[0] if node is not None and node.op_type == "Concat" and len(node.inputs) == 2 else None
        if node is None or past is None or not past.is_graph_input() or past.shape is None or len(past.shape) != 4:
            continue
        if attribute(node, "axis", 0) in (-2, 2):
            found[str(output.name)] = str(past.name)
    return found
