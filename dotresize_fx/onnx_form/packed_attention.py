"""ONNX Runtime's Attention, which holds the weights of query, key and value in one: taken apart and put together."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import onnx_ir as ir

from dotresize_fx.onnx_form.constants import constant, is_weight
from dotresize_fx.onnx_form.edits import OnnxEditor
from dotresize_fx.onnx_form.linears import attribute, bias_slot, linear_core, plugged, stored_transposed

MICROSOFT = "com.microsoft"
ROLES = ("query", "key", "value")
NAMES = "dotresize_fx.names"  # in a packed node's meta: what its weight and bias were called
Array = np.ndarray[Any, Any]
KEPT = ("num_heads", "unidirectional", "mask_filter_value", "scale")


def holds_weights(node: ir.Node) -> bool:
    """Whether a node is such an attention without a cache, and with a mask of keys alone, if any."""
    inputs = [*node.inputs, *[None] * 8]
    if node.op_type != "Attention" or node.domain != MICROSOFT or inputs[0] is None or not is_weight(inputs[1], 2):
        return False
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]) or attribute(node, "do_rotary", 0):
        return False
    mask = inputs[3]
    plain = mask is None or (mask.shape is not None and len(mask.shape) == 2)
    return plain and inputs[4] is None and inputs[6] is None and (inputs[2] is None or is_weight(inputs[2], 1))


def take_attention_apart(graph: ir.Graph, editor: OnnxEditor, node: ir.Node) -> list[ir.Node]:
    """Three linears and a MultiHeadAttention in place of the node; returns what was put there, that op last."""
    source, weight, bias, mask, _, added = [*node.inputs, *[None] * 6][:6]
    stored = constant(weight)
    assert source is not None
    assert stored is not None
    given = node.attributes.get("qkv_hidden_sizes")
    sizes = list(given.as_ints()) if given is not None else [int(stored.shape[1]) // 3] * 3  # type: ignore[arg-type]
    node.meta[NAMES] = (weight.name, bias.name if bias is not None else "")  # type: ignore[union-attr]
    made, read = [], []
    for role, size, end in zip(ROLES, sizes, accumulate(sizes), strict=True):
        name, lead = f"{node.outputs[0].name}_{role}", list(source.shape[:-1]) if source.shape is not None else None
        shape = None if lead is None else ir.Shape([*lead, size])
        value = ir.val(editor.fresh(name), source.dtype, shape)
        made.append(ir.node("MatMul", [source, _part(graph, editor, weight, role, end - size, end)], outputs=[value]))
        if bias is not None:
            product, value = value, ir.val(editor.fresh(f"{name}_shifted"), source.dtype, shape)
            shift = _part(graph, editor, bias, role, end - size, end)
            made.append(ir.node("Add", [product, shift], outputs=[value]))
        read.append(value)
    attributes = [node.attributes[name] for name in KEPT if name in node.attributes]
    inputs = [*read, None, mask, added]
    while inputs[-1] is None:
        inputs.pop()
    output = editor.stand_in_for(node.outputs[0])
    made.append(ir.Node(MICROSOFT, "MultiHeadAttention", inputs, attributes, outputs=[output], name=node.name))
    return made


def _part(graph: ir.Graph, editor: OnnxEditor, whole: ir.Value | None, role: str, start: int, end: int) -> ir.Value:
    """Columns of a packed weight, or numbers of a packed bias, which are read only when they are asked for."""
    stored = constant(whole)
    assert whole is not None
    assert stored is not None
    shape = ir.Shape([*(int(size) for size in stored.shape.numpy()[:-1]), end - start])
    value = ir.Value(name=editor.fresh(f"{whole.name}.{role}"), shape=shape, type=ir.TensorType(stored.dtype))

    def read() -> ir.TensorProtocol:
        array = np.ascontiguousarray(stored.numpy()[..., start:end])
        return ir.Tensor(array, dtype=stored.dtype, name=value.name)

    value.const_value = ir.LazyTensor(read, dtype=stored.dtype, shape=shape, name=value.name)
    graph.register_initializer(value)
    return value


def put_attention_together(graph: ir.Graph, attention: ir.Node, whole: ir.Node) -> bool:
    """One Attention again for a MultiHeadAttention whose three linears read one value; returns whether it was done."""
    cores = [_linear_of(value) for value in attention.inputs[:3]]
    if None in cores or len({core.inputs[0] for core in cores if core is not None}) != 1:
        return False
    known = [core for core in cores if core is not None]
    biases = [bias_slot(core) for core in known]
    if any((slot is None) != (biases[0] is None) for slot in biases):
        return False
    weights = [_stored(core) for core in known]
    inputs: list[ir.Value | None] = [known[0].inputs[0], _packed(graph, whole.meta[NAMES][0], weights)]
    shifts = [_array(slot[0].inputs[slot[1]]) for slot in biases if slot is not None]
    inputs.append(_packed(graph, whole.meta[NAMES][1], shifts) if shifts else None)
    mask, added = [*attention.inputs, *[None] * 6][4:6]
    inputs += [mask, None, added]
    while inputs[-1] is None:
        inputs.pop()
    attributes = dict(whole.attributes) | dict(attention.attributes)
    sizes = [int(weight.shape[1]) for weight in weights]
    if len(set(sizes)) > 1 or "qkv_hidden_sizes" in attributes:
        attributes["qkv_hidden_sizes"] = ir.AttrInt64s("qkv_hidden_sizes", sizes)
    old = attention.outputs[0]
    new = ir.val(old.name, old.dtype, old.shape)
    node = ir.Node(MICROSOFT, "Attention", inputs, attributes.values(), outputs=[new], name=whole.name)
    node.metadata_props.update(whole.metadata_props)
    graph.insert_after(attention, node)
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}_before", name
    parts = [attention, *(slot[0] for slot in biases if slot is not None), *known]
    stored = [plugged((core, 1)) for core in known] + [slot[0].inputs[slot[1]] for slot in biases if slot is not None]
    graph.remove(parts, safe=True)
    for value in stored:
        if value is not None and str(value.name) in graph.initializers and not value.uses():
            del graph.initializers[str(value.name)]
    return True


def _linear_of(value: ir.Value | None) -> ir.Node | None:
    """The product of a linear whose result nothing but the attention reads."""
    node = value.producer() if value is not None and len(value.uses()) == 1 else None
    core = linear_core(node) if node is not None else None
    return core if core is not None and core.op_type == "MatMul" else None


def _stored(core: ir.Node) -> Array:
    array = _array(plugged((core, 1)))
    return array if stored_transposed((core, 1)) else array.T


def _array(value: ir.Value | None) -> Array:
    tensor = constant(value)
    assert tensor is not None
    return tensor.numpy()


def _packed(graph: ir.Graph, name: str, parts: list[Array]) -> ir.Value:
    """The parts side by side, under the name that they had together."""
    array = np.ascontiguousarray(np.concatenate(parts, axis=-1))
    while name in graph.initializers and graph.initializers[name].uses():
        name = f"{name}_1"
    graph.initializers.pop(name, None)
    value = ir.Value(name=name, const_value=ir.Tensor(array, name=name), shape=ir.Shape(array.shape))
    value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    graph.register_initializer(value)
    return value
