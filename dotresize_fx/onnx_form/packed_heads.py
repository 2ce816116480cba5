"""GroupQueryAttention that takes query, key and value as one tensor: fed by a Split, and without one again."""

from __future__ import annotations

import onnx_ir as ir
import torch

from dotresize_fx.onnx_form.attention_ops import MICROSOFT
from dotresize_fx.onnx_form.constants import constant
from dotresize_fx.onnx_form.edits import OnnxEditor
from dotresize_fx.onnx_form.linears import attribute, linear_core
from dotresize_fx.onnx_form.packed_linears import SPLIT_OPSET

UNPACKED = "dotresize_fx.unpacked"  # in the meta of an attention that a Split feeds since


def packs_heads(node: ir.Node) -> bool:
    """Whether a node is such an attention, over heads of a known size."""
    inputs = [*node.inputs, None, None, None]
    packed = inputs[0] is not None and inputs[1] is None and inputs[2] is None
    return node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT and packed and _sizes(node) is not None


def _sizes(node: ir.Node) -> list[int] | None:
    """How wide queries, keys and values are."""
    source, heads = node.inputs[0], [int(attribute(node, name, 0)) for name in ("num_heads", "kv_num_heads")]
    width = source.shape[-1] if source is not None and source.shape else None
    producer = source.producer() if source is not None else None
    core = linear_core(producer) if producer is not None else None
    if not isinstance(width, int) and core is not None and core.op_type == "MatMul":
        weight = constant(core.inputs[1])
        width = None if weight is None else int(weight.shape.numpy()[-1])
    every = heads[0] + 2 * heads[1]
    if not isinstance(width, int) or not every or width % every:
        return None
    return [count * width // every for count in (heads[0], heads[1], heads[1])]


def unpack_heads(graph: ir.Graph, editor: OnnxEditor, node: ir.Node) -> None:
    """Put a Split between the packed tensor and the attention."""
    source, sizes = node.inputs[0], _sizes(node)
    assert source is not None
    assert sizes is not None
    modern = graph.opset_imports.get("", 1) >= SPLIT_OPSET
    lead = list(source.shape[:-1]) if source.shape else None
    parts = [
        ir.val(
            editor.fresh(f"{node.outputs[0].name}_{role}"), source.dtype, None if lead is None else ir.Shape([*lead, n])
        )
        for role, n in zip(("query", "key", "value"), sizes, strict=True)
    ]
    attributes: dict[str, int | list[int]] = {"axis": -1} if modern else {"axis": -1, "split": sizes}
    inputs = [source]
    if modern:
        inputs.append(editor.add_initializer(f"{node.outputs[0].name}_sizes", torch.tensor(sizes)))
    split = ir.node("Split", inputs, attributes, outputs=parts, name=f"{node.outputs[0].name}_split")
    graph.insert_before(node, split)
    for place, part in enumerate(parts):
        node.replace_input_with(place, part)
    node.meta[UNPACKED] = True


def pack_heads(graph: ir.Graph, node: ir.Node) -> bool:
    """Let the attention read what one Split alone parts for it; returns whether it does."""
    parts = list(node.inputs[:3])
    split = parts[0].producer() if parts[0] is not None else None
    if split is None or split.op_type != "Split" or list(split.outputs) != parts:
        return False
    if any(len(part.uses()) > 1 or part.is_graph_output() for part in split.outputs):
        return False
    source, *stated = split.inputs
    node.replace_input_with(0, source)
    node.replace_input_with(1, None)
    node.replace_input_with(2, None)
    graph.remove(split, safe=True)
    for value in stated:
        if value is not None and str(value.name) in graph.initializers and not value.uses():
            del graph.initializers[str(value.name)]
    return True
