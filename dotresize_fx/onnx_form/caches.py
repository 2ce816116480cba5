"""A graph's cache: keys and values of earlier tokens that it reads, and hands on with those of its own tokens."""

from __future__ import annotations

import onnx_ir as ir

from dotresize_fx.onnx_form.attention_ops import cache_of
from dotresize_fx.onnx_form.linears import attribute


def find_caches(graph: ir.Graph) -> dict[str, str]:
    """Outputs that are an input with more tokens behind it, (batch, heads, length, size), and that input; by name."""
    found = {}
    for output in graph.outputs:
        node = output.producer()
        if node is None:
            continue
        behind = node.op_type == "Concat" and len(node.inputs) == 2 and attribute(node, "axis", 0) in (-2, 2)
        past = node.inputs[0] if behind else cache_of(node, output)
        if past is not None and past.is_graph_input() and past.shape is not None and len(past.shape) == 4:
            found[str(output.name)] = str(past.name)
    return found
