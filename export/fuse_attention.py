"""Attention that keeps its own cache and reads KV heads unrepeated, as ONNX's op for it can (Attention, opset 23).

ONNX Runtime's GroupQueryAttention is not taken: behind a past it takes several new tokens of one sequence alone, and
it was slower wherever both were timed (``benchmarks/attention_ops.py``).
"""

from __future__ import annotations

import onnx_ir
import torch

from dotresize_fx.cache_names import PAST
from dotresize_fx.export.replace_value import replace_value
from dotresize_fx.fx_form.graph import FxGraph

OPSET = 23
_REPEAT = ("Reshape", "Expand", "Unsqueeze")


def mark_grouped_queries(graph: FxGraph) -> None:
    """Say of one key and value that are broadcast over all queries that they are a group's, as the converter asks."""
    for node in graph.nodes.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default):
        query, key, value = (each.meta["val"].shape for each in node.args[:3])
        if len(query) == len(key) == len(value) == 4 and key[1] == value[1] == 1 != query[1]:
            node.kwargs = node.kwargs | {"enable_gqa": True}


def fuse_attention(model: onnx_ir.Model) -> int:
    """Rewrite each ``Attention`` that reads repeated KV heads or a cache; returns how many.

    before::

        present_key = Concat(past_key, new_key)                       # (batch, KV heads, length, size)
        out = Attention(query, repeat(present_key), repeat(present_value), mask)

    after::

        out, present_key, present_value = Attention(query, new_key, new_value, mask, past_key, past_value)

    A cache that something else reads too stays outside, as do heads that are repeated for the keys alone.
    """
    nodes = [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]
    return sum(_fuse(model.graph, node) for node in nodes)


def _fuse(graph: onnx_ir.Graph, node: onnx_ir.Node) -> bool:
    query, keys, values, *mask = node.inputs
    if query is None or keys is None or values is None or len(node.outputs) != 1 or len(mask) > 1:
        return False
    key, value = _unrepeated(keys), _unrepeated(values)
    if key.shape is None or value.shape is None or key.shape[1] != value.shape[1]:
        key, value = keys, values
    cached = _is_cache(key, keys) and _is_cache(value, values) and key is not value
    if key is keys and not cached:
        return False
    inputs = [query, key, value, *mask]
    if cached:
        (past_key, new_key), (past_value, new_value) = (each.producer().inputs for each in (key, value))  # type: ignore[union-attr]
        inputs = [query, new_key, new_value, *(mask or [None]), past_key, past_value]
    fused = onnx_ir.node(
        "Attention",
        inputs,
        dict(node.attributes),
        num_outputs=3 if cached else 1,
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    graph.insert_before(node, fused)
    for old, new in zip((node.outputs[0], key, value), fused.outputs, strict=False):
        replace_value(old, new)
    return True


def _unrepeated(states: onnx_ir.Value) -> onnx_ir.Value:
    """What repeats each head for its queries, (batch, KV heads, length, size), else ``states``."""
    current: onnx_ir.Value | None = states
    shapes = []
    for op_type in _REPEAT:
        node = current.producer() if current is not None else None
        if current is None or node is None or node.op_type != op_type or current.shape is None:
            return states
        shapes.append(current.shape)
        current = node.inputs[0]
    if (
        current is None
        or current.shape is None
        or len(current.shape) != 4
        or [len(each) for each in shapes] != [4, 5, 5]
    ):
        return states
    merged, wide, opened = shapes
    heads, repeats = wide[1], wide[2]
    whole = isinstance(heads, int) and isinstance(repeats, int) and merged[1] == heads * repeats
    return current if whole and opened[1] == current.shape[1] == heads and opened[2] == 1 else states


def _is_cache(present: onnx_ir.Value, read: onnx_ir.Value) -> bool:
    """Whether a value is an input with new tokens behind it, put out, and read by one attention alone, as ``read``."""
    node = present.producer()
    if node is None or node.op_type != "Concat" or node.attributes.get_int("axis") not in (2, -2):
        return False
    past = node.inputs[0]
    if len(node.inputs) != 2 or past is None or not past.is_graph_input() or not (past.name or "").startswith(PAST):
        return False
    current = read
    while current is not present:
        producer = current.producer()
        if producer is None or producer.inputs[0] is None or len(list(current.uses())) != 1:
            return False
        current = producer.inputs[0]
    return present.is_graph_output() and len(list(present.uses())) == 1
