"""Linears that a packed one was seen as, written again as one product whose result is split."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch

from dotresize_fx.onnx_form.constants import constant, is_weight, to_torch
from dotresize_fx.onnx_form.edits import OnnxEditor
from dotresize_fx.onnx_form.linears import bias_slot, plugged, stored_transposed
from dotresize_fx.packing import Packing

SPLIT_OPSET = 13  # the first in which a Split reads its sizes


def put_linears_together(graph: ir.Graph, editor: OnnxEditor, packings: Mapping[str, Packing]) -> int:
    """Join the parts of each packed linear that still read one value alike; returns how many there were."""
    joined = 0
    for name, packing in packings.items():
        values = [graph.initializers.get(part) for part in packing.parts]
        cores = [_only_reader(value) for value in values]
        if packing.groups == 1 and None not in cores:
            joined += _join(graph, editor, name, [core for core in cores if core is not None], packings)
    return joined


def _only_reader(value: ir.Value | None) -> ir.Node | None:
    """The MatMul that alone has this weight, stored as (in, out)."""
    uses = list(value.uses()) if value is not None and is_weight(value, 2) else []
    alone = len(uses) == 1 and uses[0].node.op_type == "MatMul" and uses[0].idx == 1
    return uses[0].node if alone and stored_transposed((uses[0].node, 1)) else None


def _join(
    graph: ir.Graph, editor: OnnxEditor, name: str, cores: list[ir.Node], packings: Mapping[str, Packing]
) -> bool:
    source, biases = cores[0].inputs[0], [bias_slot(core) for core in cores]
    shifts = [plugged(slot) for slot in biases if slot is not None]
    if any(core.inputs[0] is not source for core in cores) or len(shifts) not in (0, len(cores)):
        return False
    order = {node: place for place, node in enumerate(graph)}
    first = min(cores, key=order.__getitem__)
    weights = [plugged((core, 1)) for core in cores]
    old = [core.outputs[0] if slot is None else slot[0].outputs[0] for core, slot in zip(cores, biases, strict=True)]
    if any(value.is_graph_output() for value in old):
        return False
    sizes = [int(weight.shape[1]) for weight in weights]  # type: ignore[index, arg-type]
    lead = list(old[0].shape[:-1]) if old[0].shape is not None else None
    shape = None if lead is None else ir.Shape([*lead, sum(sizes)])
    value = ir.val(editor.fresh(f"{name}_product"), old[0].dtype, shape)
    editor.insert("MatMul", [source, _packed(graph, editor, name, weights)], value, before=first)
    if shifts:
        parts = tuple(shift.name for shift in shifts)
        called = next((key for key, packing in packings.items() if packing.parts == parts), f"{name}.bias")
        shift, product = _packed(graph, editor, called, shifts), value
        value = ir.val(editor.fresh(f"{name}_shifted"), old[0].dtype, shape)
        editor.insert("Add", [product, shift], value, before=first)
    modern = graph.opset_imports.get("", 1) >= SPLIT_OPSET
    stated = editor.add_initializer(f"{name}_sizes", torch.tensor(sizes)) if modern else None
    attributes: dict[str, int | list[int]] = {"axis": -1} if modern else {"axis": -1, "split": sizes}
    outputs = [editor.stand_in_for(one) for one in old]
    inputs = [value] if stated is None else [value, stated]
    graph.insert_before(first, ir.node("Split", inputs, attributes, outputs=outputs, name=f"{name}_split"))
    graph.remove({*cores, *(slot[0] for slot in biases if slot is not None)}, safe=True)
    for stored in (*weights, *shifts):
        if str(stored.name) in graph.initializers and not stored.uses():
            del graph.initializers[str(stored.name)]
    return True


def _packed(graph: ir.Graph, editor: OnnxEditor, name: str, parts: list[ir.Value]) -> ir.Value:
    """The parts side by side, by the name that they had together where nothing else has it."""
    tensors = [constant(part) for part in parts]
    packed = torch.cat([to_torch(tensor) for tensor in tensors if tensor is not None], dim=-1)
    value = editor.add_initializer(name, packed)
    if name not in graph.initializers:
        value.name = name
    return value
