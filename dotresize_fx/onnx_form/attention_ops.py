"""Ops that are a whole attention, or turn queries and keys: their inputs and what they state of heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from dotresize_fx.onnx_form.linears import attribute
from dotresize_fx.onnx_form.sizes import sizes_of

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class _Op:
    """``heads`` are the attributes with the number of query and of KV heads (one name: they are as many).

    ``mask`` is the input that is added to the scores, ``past`` those with earlier keys and values, ``alone`` those with
    which it is not understood. ``one_size``: query, key and value heads have to be of one size.
    """

    heads: tuple[str, ...]
    mask: int
    past: tuple[int, int]
    alone: tuple[int, ...] = ()
    one_size: bool = False


_OPS = {
    ("", "Attention"): _Op(("q_num_heads", "kv_num_heads"), 3, (4, 5), (6,)),
    (MICROSOFT, "MultiHeadAttention"): _Op(("num_heads",), 5, (6, 7), (3, 8, 9)),
    (MICROSOFT, "GroupQueryAttention"): _Op(("num_heads", "kv_num_heads"), 10, (3, 4), (11, 12, 13), one_size=True),
}
# Inputs of a rotary embedding: what it turns, cosines and sines.
_ROTARY = {("", "RotaryEmbedding"): (0, 1, 2), (MICROSOFT, "RotaryEmbedding"): (0, 2, 3)}


def head_counts(node: ir.Node) -> tuple[str, ...]:
    """The attributes in which a node states numbers of heads."""
    known = _OPS.get((node.domain, node.op_type))
    if known is not None:
        return known.heads
    return ("num_heads",) if (node.domain, node.op_type) in _ROTARY else ()


def read_attention_op(node: ir.Node) -> tuple[tuple[ir.Value, ...], dict[str, Any]] | None:
    """Query, key, value and a mask, and the view's attributes; None for an op that is not understood.

    Where its inputs are (batch, length, heads times size) it says how many heads they are: ``merged``, and ``sizes``.
    """
    known = _OPS.get((node.domain, node.op_type))
    inputs = list(node.inputs) + [None] * 16
    if known is None or None in inputs[:3] or any(inputs[place] is not None for place in known.alone):
        return None
    ranks = [len(sizes_of(value) or ()) for value in (*inputs[:3], node.outputs[0])]
    if set(ranks) not in ({3}, {4}) or any(output.uses() for output in node.outputs[1:]):
        return None
    if any(output.is_graph_output() for output in node.outputs[3:]):
        return None
    stated = tuple(int(attribute(node, name, 0)) for name in known.heads)
    scale = attribute(node, "scale", 0.0)
    attributes: dict[str, Any] = {"scale": float(scale) or None, "grouped": True}
    if ranks[0] == 3:
        attributes |= {"merged": True, "sizes": stated}
    if known.one_size:
        attributes["one_size"] = True
    presents = dict(zip(("key", "value"), node.outputs[1:3], strict=False))
    attributes["cache"] = {role: str(value.name) for role, value in presents.items() if value.is_graph_output()}
    mask = inputs[known.mask]
    read = (*inputs[:3], *(() if mask is None else (mask,)))
    return tuple(value for value in read if value is not None), attributes


def cache_of(node: ir.Node, output: ir.Value) -> ir.Value | None:
    """The input that an attention's output carries on, which has the keys or values of earlier tokens."""
    known = _OPS.get((node.domain, node.op_type))
    index = output.index()
    if known is None or index not in (1, 2) or len(node.inputs) <= known.past[index - 1]:
        return None
    return node.inputs[known.past[index - 1]]


def past_heads(past: ir.Value) -> tuple[int, int] | None:
    """How many heads, and of which size, the attention that reads a cache has; None where that is not known."""
    for use in past.uses():
        node, known = use.node, _OPS.get((use.node.domain, use.node.op_type))
        if known is None or use.idx not in known.past:
            continue
        query, whole = (int(attribute(node, known.heads[place], 0)) for place in (0, -1))
        packed = node.inputs[1] is None  # keys and values stand behind the queries
        sizes = sizes_of(node.inputs[0 if packed else 1 + known.past.index(use.idx)])
        count = query + 2 * whole if packed else whole
        if sizes is not None and len(sizes) == 3 and isinstance(sizes[2], int) and count and sizes[2] % count == 0:
            return whole, sizes[2] // count
    return None


def read_rotary_op(node: ir.Node) -> tuple[tuple[ir.Value, ...], dict[str, Any]] | None:
    """What is turned, cosines and sines, (..., half of the head); None unless whole heads are turned, by halves."""
    places = _ROTARY.get((node.domain, node.op_type))
    if places is None or len(node.inputs) <= max(places) or any(node.inputs[place] is None for place in places):
        return None
    if any(attribute(node, name, 0) for name in ("interleaved", "rotary_embedding_dim", "is_packed_batching")):
        return None
    heads, rank = int(attribute(node, "num_heads", 0)), len(sizes_of(node.inputs[0]) or ())
    if rank == 3 and not heads:
        return None
    read = tuple(value for value in (node.inputs[place] for place in places) if value is not None)
    return read, {"rotary": True, **({"sizes": (heads,)} if heads else {})}
