"""One Transpose for a Reshape that joins axes, a Transpose of the last two, and a Reshape that parts them again."""

from __future__ import annotations

import onnx_ir as ir

from dotresize_fx.onnx_form.edits import OnnxEditor
from dotresize_fx.onnx_form.shape_rules import sizes_of


def join_permutations(graph: ir.Graph, editor: OnnxEditor) -> list[str]:
    """See :meth:`dotresize_fx.graph.Graph.join_permutations`."""
    joined = []
    for last in [node for node in graph if node.op_type == "Reshape" and node.domain == ""]:
        source = _turned(last)
        if source is None or last.outputs[0].is_graph_output():
            continue
        name = last.outputs[0].name
        editor.insert("Transpose", [source], editor.stand_in_for(last.outputs[0]), {"perm": [0, 1, 3, 2]}, before=last)
        graph.remove(last, safe=True)
        joined.append(f"{name}: one permutation")
    return joined


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
