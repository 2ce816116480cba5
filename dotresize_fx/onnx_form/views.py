"""Reshapes that do several things at once, or by a detour, as what the passes know."""

from __future__ import annotations

import onnx_ir as ir
import torch

from dotresize_fx.onnx_form.edits import OnnxEditor
from dotresize_fx.onnx_form.sizes import sizes_of


def normalise_views(graph: ir.Graph, editor: OnnxEditor) -> list[str]:
    """See :meth:`dotresize_fx.graph.Graph.normalise_views`."""
    changed = _undo(graph)
    for node in [node for node in graph if node.op_type == "Reshape" and node.domain == ""]:
        source, name = _turned(node), node.outputs[0].name
        if source is not None and not node.outputs[0].is_graph_output():
            output = editor.stand_in_for(node.outputs[0])
            editor.insert("Transpose", [source], output, {"perm": [0, 1, 3, 2]}, before=node)
            graph.remove(node, safe=True)
            changed.append(f"{name}: one permutation")
        elif _joins_twice(node):
            _join_heads_first(editor, node)
            changed.append(f"{name}: heads joined first")
    return changed


def _undo(graph: ir.Graph) -> list[str]:
    """Let what reads a Reshape that takes the one before it back read what that one read."""
    undone = []
    for node in [node for node in graph if node.op_type == "Reshape" and node.domain == ""]:
        first, output = _before(node, "Reshape"), node.outputs[0]
        source = None if first is None else first.inputs[0]
        shape = sizes_of(source)
        if source is None or not shape or shape != sizes_of(output) or output.is_graph_output() or not output.uses():
            continue
        output.replace_all_uses_with(source)
        undone.append(f"{output.name}: taken apart and put together again")
    return undone


def _joins_twice(node: ir.Node) -> bool:
    """Whether rows and heads are joined at once, (batch, length, heads, size) to (rows, width)."""
    before, after = sizes_of(node.inputs[0]), sizes_of(node.outputs[0])
    if before is None or after is None or len(before) != 4 or len(after) != 2:
        return False
    heads, size = before[2:]
    return isinstance(heads, int) and isinstance(size, int) and after[1] == heads * size


def _join_heads_first(editor: OnnxEditor, node: ir.Node) -> None:
    source, width = node.inputs[0], sizes_of(node.outputs[0])[1]  # type: ignore[index]
    assert source is not None
    assert source.shape is not None
    sizes = editor.add_initializer(f"{node.outputs[0].name}_sizes", torch.tensor([0, 0, width]))
    joined = ir.val(editor.fresh(f"{node.outputs[0].name}_joined"), source.dtype, ir.Shape([*source.shape[:2], width]))
    editor.insert("Reshape", [source, sizes], joined, before=node)
    node.replace_input_with(0, joined)


def _turned(last: ir.Node) -> ir.Value | None:
    """What a Reshape gives with the last two of its four axes exchanged, if it does no more."""
    turn = _before(last, "Transpose")
    first = None if turn is None else _before(turn, "Reshape")
    order = None if turn is None else turn.attributes.get("perm")
    if first is None or order is None or list(order.as_ints()) != [0, 2, 1]:
        return None
    source = first.inputs[0]
    before, between, after = sizes_of(source), sizes_of(first.outputs[0]), sizes_of(last.outputs[0])
    if before is None or between is None or after is None or len(before) != 4 or len(between) != 3:
        return None
    turned = (*before[:2], before[3], before[2]) == after and between[1:] == before[2:]
    return source if turned else None


def _before(node: ir.Node, op_type: str) -> ir.Node | None:
    source = node.inputs[0]
    found = source.producer() if source is not None else None
    return found if found is not None and found.op_type == op_type and found.domain == "" else None
