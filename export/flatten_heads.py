"""Attention over (batch, length, heads * size), as linears put it out, where heads were moved to the front."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir
from onnx_ir import tape

from dotresize_fx.export.replace_value import replace_value

HEADS_FIRST = [0, 2, 1, 3]


@dataclass(frozen=True)
class _Side:
    """Query, key or value: (batch, length, heads, size) before its heads are moved, and the rotation behind that."""

    rows: onnx_ir.Value
    rotary: onnx_ir.Node | None
    heads: int
    size: int


def flatten_heads(model: onnx_ir.Model) -> int:
    """Take the moving of heads out from around each ``Attention``; returns from around how many.

    before::

        query = RotaryEmbedding(Transpose(Reshape(q)), cos, sin)      # (batch, heads, length, size), as are the others
        out = Reshape(Transpose(Where(mask, 0, Attention(query, key, value, ...))))

    after::

        query = RotaryEmbedding(q, cos, sin)                          # (batch, length, heads * size)
        out = Where(Squeeze(mask), 0, Attention(query, key, value, ...))

    One whose inputs or whose output do not come that way stays as it is.
    """
    nodes = [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]
    squeezed: dict[onnx_ir.Value, onnx_ir.Value] = {}
    return sum(_flatten(model.graph, node, squeezed) for node in nodes)


def _flatten(graph: onnx_ir.Graph, node: onnx_ir.Node, squeezed: dict[onnx_ir.Value, onnx_ir.Value]) -> bool:
    """``squeezed`` holds the masks of the layers before, which are mostly this one's."""
    sides = [_side(value) for value in node.inputs[:3]]
    moved = _moved_back(node.outputs[0])
    query, key, value = sides
    if query is None or key is None or value is None or moved is None or len(node.outputs) > 3:
        return False
    where, result = moved
    width = query.heads * value.size
    if result.shape is None or len(result.shape) != 3 or result.shape[2] not in (width, None):
        return False
    written = tape.Tape(graph)
    flat = [_flat(written, side) for side in (query, key, value)]
    outputs = written.op_multi_out(
        "Attention",
        [*flat, *node.inputs[3:]],
        attributes=dict(node.attributes) | {"q_num_heads": query.heads, "kv_num_heads": key.heads},
        num_outputs=len(node.outputs),
    )
    out = outputs[0]
    if where is not None:
        condition, zero, _ = where.inputs
        assert condition is not None
        if condition not in squeezed:
            squeezed[condition] = written.op("Squeeze", [condition, _numbers(written, [1])])
            squeezed[condition].type = condition.type
        out.shape, out.type = result.shape, result.type
        out = written.op("Where", [squeezed[condition], zero, out])
    for old, new in zip((result, *node.outputs[1:]), (out, *outputs[1:]), strict=True):
        replace_value(old, new)
    for each in written.nodes:  # to which part of the model a node belongs
        like = where if each.op_type == "Where" else node
        each.metadata_props.update(like.metadata_props if like is not None else {})
    graph.insert_before(node, written.nodes)
    return True


def _side(value: onnx_ir.Value | None) -> _Side | None:
    producer = value.producer() if value is not None else None
    rotary = None
    if producer is not None and producer.op_type == "RotaryEmbedding":
        rotary, source = producer, producer.inputs[0]
        producer = source.producer() if source is not None else None
    if producer is None or not _moves_heads(producer) or (rows := producer.inputs[0]) is None or rows.shape is None:
        return None
    heads, size = rows.shape[2], rows.shape[3]
    return _Side(rows, rotary, heads, size) if isinstance(heads, int) and isinstance(size, int) else None


def _flat(written: tape.Tape, side: _Side) -> onnx_ir.Value:
    reshape = side.rows.producer()
    flat = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
    if flat is None or flat.shape is None or len(flat.shape) != 3 or flat.shape[2] != side.heads * side.size:
        flat = written.op("Reshape", [side.rows, _numbers(written, [0, 0, side.heads * side.size])])
    if side.rotary is None:
        return flat
    attributes = dict(side.rotary.attributes) | {"num_heads": side.heads}
    return written.op(
        "RotaryEmbedding", [flat, *side.rotary.inputs[1:]], attributes=attributes, domain=side.rotary.domain
    )


def _moved_back(out: onnx_ir.Value) -> tuple[onnx_ir.Node | None, onnx_ir.Value] | None:
    """The zeroing of rows that see nothing, if any, and what comes behind the moving back of the heads."""
    reader, where = _only_reader(out), None
    if reader is not None and reader.op_type == "Where" and reader.inputs[2] is out:
        condition, zero, _ = reader.inputs
        shape = condition.shape if condition is not None else None
        if shape is None or len(shape) != 4 or shape[1] != 1 or zero is None or zero.shape is None or len(zero.shape):
            return None
        where, reader = reader, _only_reader(reader.outputs[0])
    if reader is None or not _moves_heads(reader):
        return None
    reshape = _only_reader(reader.outputs[0])
    return (where, reshape.outputs[0]) if reshape is not None and reshape.op_type == "Reshape" else None


def _moves_heads(node: onnx_ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == HEADS_FIRST


def _only_reader(value: onnx_ir.Value) -> onnx_ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _numbers(written: tape.Tape, numbers: list[int]) -> onnx_ir.Value:
    name = "numbers_" + "_".join(map(str, numbers))
    known = written.graph_like.initializers if isinstance(written.graph_like, onnx_ir.Graph) else {}
    return known[name] if name in known else written.initializer(onnx_ir.tensor(numbers, name=name), name=name)
