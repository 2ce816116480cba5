"""Rotary tables of fewer pairs than the model's, taken out of it layer by layer, are taken out all at once."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir
from onnx_ir import tape

from dotresize_fx.export.replace_value import replace_value


def join_table_gathers(model: onnx_ir.Model) -> int:
    """Gathers of constant places along the last axis of one computed value become one, and a Split of what it takes.

    Each would be a kernel of its own on a GPU, which takes longer to start than to run. Returns how many went.
    """
    groups: dict[onnx_ir.Value, list[onnx_ir.Node]] = defaultdict(list)
    for node in model.graph:
        if _takes_places(node):
            assert node.inputs[0] is not None
            groups[node.inputs[0]].append(node)
    gone = 0
    for table, gathers in groups.items():
        if len(gathers) > 1:
            _join(model.graph, table, gathers)
            gone += len(gathers) - 1
    return gone


def _takes_places(node: onnx_ir.Node) -> bool:
    if node.op_type != "Gather" or node.domain != "":
        return False
    table, places = node.inputs
    if table is None or table.producer() is None or table.shape is None or places is None or places.const_value is None:
        return False
    axis = node.attributes.get_int("axis", 0)
    last = axis in (-1, len(table.shape) - 1)
    return last and len(places.const_value.shape) == 1 and not node.outputs[0].is_graph_output()


def _join(graph: onnx_ir.Graph, table: onnx_ir.Value, gathers: list[onnx_ir.Node]) -> None:
    places = [node.inputs[1].const_value.numpy().astype(np.int64) for node in gathers]  # type: ignore[union-attr]
    written = tape.Tape(graph)
    wanted = written.initializer(onnx_ir.tensor(np.concatenate(places)), name=f"{table.name}_places")
    sizes = written.initializer(onnx_ir.tensor(np.array([len(each) for each in places])), name=f"{table.name}_sizes")
    taken = written.op("Gather", [table, wanted], attributes={"axis": -1})
    taken.shape = onnx_ir.Shape([*table.shape[:-1], sum(map(len, places))])  # type: ignore[index]
    taken.type = table.type
    parts = [onnx_ir.val(f"{node.outputs[0].name}_part") for node in gathers]
    written.op_multi_out("Split", [taken, sizes], outputs=parts, attributes={"axis": -1})
    graph.insert_before(gathers[0], written.nodes)
    for node, part in zip(gathers, parts, strict=True):
        replace_value(node.outputs[0], part)
        graph.remove(node, safe=True)
