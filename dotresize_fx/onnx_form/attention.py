"""See an attention that is spelled op by op: softmax(q @ k' + mask) @ v, with factors, casts and the like between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from dotresize_fx.onnx_form.constants import constant, number
from dotresize_fx.onnx_form.linears import attribute, is_linear


@dataclass(frozen=True)
class SpelledAttention:
    """``mixing`` multiplies the weights with ``value``, ``scores`` the ``query`` with ``key``, which is turned round.

    ``masks`` are what else goes into the weights, ``inside`` the nodes from the scores on, without ``mixing``. Where
    the scores are made in a way not taught here there is no query, and ``masks`` are the weights.
    """

    mixing: ir.Node
    value: ir.Value
    query: ir.Value | None = None
    key: ir.Value | None = None
    masks: tuple[ir.Value, ...] = ()
    inside: frozenset[ir.Node] = field(default=frozenset())

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """In the order of the neutral view."""
        if self.query is None or self.key is None:
            return (*self.masks, self.value)
        return (self.query, self.key, self.value, *self.masks)


def spelled_attentions(graph: ir.Graph) -> Iterator[SpelledAttention]:
    """Every product of softmax weights with values, (batch, heads, length, size)."""
    for node in graph:
        if node.op_type == "MatMul" and node.domain == "" and node.outputs[0].shape is not None:
            found = _read(node) if len(node.outputs[0].shape) == 4 else None
            if found is not None:
                yield found


def _read(mixing: ir.Node) -> SpelledAttention | None:
    weights, value = mixing.inputs
    if weights is None or value is None or constant(value) is not None:
        return None
    behind = _behind_softmax(weights)
    if behind is None:
        return None
    softmax, inside = behind
    plain = SpelledAttention(mixing, value, masks=(weights,))
    read = _scores(softmax.inputs[0])
    if read is None:
        return plain
    inside |= {softmax, *read.inside}
    outside = {mixing, *inside}
    if any(
        output.is_graph_output() or not {use.node for use in output.uses()} <= outside
        for node in inside
        for output in node.outputs
    ):
        return plain
    return replace(read, mixing=mixing, value=value, inside=frozenset(inside))


def _behind_softmax(value: ir.Value | None) -> tuple[ir.Node, set[ir.Node]] | None:
    """The softmax over the last axis that a value comes from, by casts and a mending of NaN and what is between."""
    inside: set[ir.Node] = set()
    while value is not None and (node := value.producer()) is not None and node.domain == "":
        if node.op_type == "Softmax":
            rank = len(value.shape) if value.shape is not None else 0
            return (node, inside) if int(attribute(node, "axis", -1)) in (-1, rank - 1) else None
        test = node.inputs[0].producer() if node.op_type == "Where" and node.inputs[0] is not None else None
        if test is not None and test.op_type == "IsNaN" and test.inputs[0] is node.inputs[2]:
            inside |= {node, test}
            value = node.inputs[2]
        elif node.op_type in ("Cast", "Identity"):
            inside.add(node)
            value = node.inputs[0]
        else:
            return None
    return None


def _scores(value: ir.Value | None) -> SpelledAttention | None:
    """The product that a softmax's input comes from, through functions of each score and what is added to them."""
    node = value.producer() if value is not None else None
    if node is None or node.domain != "":
        return None
    if node.op_type == "MatMul":
        query, key = node.inputs
        rank = len(node.outputs[0].shape) if node.outputs[0].shape is not None else 0
        if rank != 4 or query is None or key is None or is_linear(node):
            return None
        return SpelledAttention(node, key, query, key, inside=frozenset({node}))
    through = {"Add": (0, 1), "Where": (1, 2), "Mul": (0, 1), "Div": (0,), "Cast": (0,), "Tanh": (0,), "Identity": (0,)}
    for place in through.get(node.op_type, ()):
        others = [other for i, other in enumerate(node.inputs) if i != place and other is not None]
        if node.op_type in ("Mul", "Div") and any(number(other) is None for other in others):
            continue
        found = _scores(node.inputs[place])
        if found is not None:
            masks = (*found.masks, *(other for other in others if number(other) is None))
            return replace(found, masks=masks, inside=found.inside | {node})
    return None
