"""Where ONNX nodes keep their weights: a linear in its spellings, and the orientation it is stored in."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from dotresize_fx.onnx_form.constants import constant, is_weight

# One input of one node: where a weight is plugged in.
Slot = tuple[ir.Node, int]

# Marks in a node's meta that its bias is known as one, while an edit has given weight and bias different sizes.
BIASED = "dotresize_fx.biased"


def attribute(node: ir.Node, name: str, default: float | int) -> float | int:
    """A number among the node's attributes."""
    found = node.attributes.get(name)
    return default if found is None or found.is_ref() else found.value


def plugged(slot: Slot) -> ir.Value:
    """The constant behind a slot, seen through a Transpose in between."""
    node, index = slot
    value = node.inputs[index]
    assert value is not None
    transpose = value.producer()
    if transpose is not None and is_transposed_weight(transpose):
        value = transpose.inputs[0]
        assert value is not None
    return value


def wants_transposed(slot: Slot) -> bool:
    """Whether a weight goes into this slot as (in, out), which is not the view's orientation."""
    node, index = slot
    if index != 1:
        return False
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0))


def stored_transposed(slot: Slot) -> bool:
    """Whether the constant behind a slot is stored as (in, out)."""
    node, index = slot
    return wants_transposed(slot) != (node.inputs[index] is not plugged(slot))


def slots(value: ir.Value) -> set[Slot]:
    """Every input that ``value`` is plugged into, directly or through a Transpose of its own."""
    found: set[Slot] = set()
    for node, index in value.uses():
        if is_transposed_weight(node) and not node.outputs[0].is_graph_output():
            found.update((use.node, use.idx) for use in node.outputs[0].uses())
        else:
            found.add((node, index))
    return found


def is_linear(node: ir.Node) -> bool:
    """MatMul with a constant matrix on the right; Gemm as ``x @ W + c`` with constants; transposed or not.

    A constant that is read in both orientations (an autoencoder that uses W and its transpose) is no linear's
    weight: the two uses would couple its rows with its columns.
    """
    if node.domain != "" or not _takes_a_weight(node):
        return False
    readings = {
        stored_transposed((user, index)) for user, index in slots(plugged((node, 1))) if _is_weight_slot(user, index)
    }
    return len(readings) == 1


def _takes_a_weight(node: ir.Node) -> bool:
    if node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2 or None in node.inputs[:2]:
        return False
    weight = plugged((node, 1))
    if not is_weight(weight, 2) or constant(node.inputs[0]) is not None:
        return False
    if node.op_type == "MatMul":
        return True
    plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1 and not attribute(node, "transA", 0)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return plain and (bias is None or _is_bias(bias, node))


def _is_weight_slot(node: ir.Node, index: int) -> bool:
    if node.op_type == "Gather":
        return index == 0
    return index == 1 and node.op_type in ("MatMul", "Gemm")


def _is_bias(value: ir.Value | None, core: ir.Node) -> bool:
    """Whether ``value`` is a constant (out,)."""
    tensor = constant(value)
    if tensor is None or not is_weight(value, 1):
        return False
    return bool(core.meta.get(BIASED)) or tensor.shape[0] == _rows(core)


def _rows(core: ir.Node) -> object:
    tensor = constant(plugged((core, 1)))
    assert tensor is not None
    return tensor.shape[1 if stored_transposed((core, 1)) else 0]


def bias_slot(core: ir.Node) -> Slot | None:
    """Where a linear's bias is plugged in: Gemm's third input, or the Add that alone reads a MatMul."""
    if core.op_type == "Gemm":
        return (core, 2) if len(core.inputs) > 2 and core.inputs[2] is not None else None
    product = core.outputs[0]
    uses = list(product.uses())
    if product.is_graph_output() or len(uses) != 1:
        return None
    add, index = uses[0]
    if add.op_type != "Add" or add.domain != "" or add.graph is not core.graph:
        return None
    return (add, 1 - index) if _is_bias(add.inputs[1 - index], core) else None


def linear_core(node: ir.Node) -> ir.Node | None:
    """The MatMul or Gemm of the linear that ``node`` ends: itself, or the MatMul in front of the Add of a bias."""
    if is_linear(node):
        return node
    for value in node.inputs if node.op_type == "Add" and node.domain == "" else ():
        core = value.producer() if value is not None else None
        if core is not None and core.op_type == "MatMul" and is_linear(core):
            slot = bias_slot(core)
            if slot is not None and slot[0] is node:
                return core
    return None


def is_transposed_weight(node: ir.Node) -> bool:
    """A Transpose of a constant matrix."""
    if node.op_type != "Transpose" or node.domain != "" or not is_weight(node.inputs[0], 2):
        return False
    order = node.attributes.get("perm")
    return order is None or list(order.as_ints()) == [1, 0]


def is_part_of_linear(node: ir.Node) -> bool:
    """Whether the view shows the node only as part of a linear: a MatMul before its bias, a Transpose of a weight."""
    if is_transposed_weight(node):
        output = node.outputs[0]
        return not output.is_graph_output() and all(index == 1 and is_linear(user) for user, index in output.uses())
    if node.op_type != "MatMul" or not is_linear(node):
        return False
    return bias_slot(node) is not None


def weight_readers(node: ir.Node) -> Iterator[ir.Node]:
    """The visible nodes behind ``node``: itself, the Add of its bias, or the linears behind a transposed weight."""
    if not is_part_of_linear(node):
        yield node
    elif node.op_type == "MatMul":
        yield next(iter(node.outputs[0].uses())).node
    else:
        for user in node.outputs[0].consumers():
            yield from weight_readers(user)
