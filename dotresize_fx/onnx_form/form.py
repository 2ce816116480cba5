"""A node of an ONNX graph as the neutral view shows it, and what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from dotresize_fx.graph import Kind
from dotresize_fx.onnx_form.linears import Slot


@dataclass(frozen=True)
class Form:
    """A node read once, or one output of a Split.

    ``core`` does the work; ``last`` has the output (the Add of a bias, else ``core``), at ``index`` among its own.
    """

    kind: Kind
    core: ir.Node
    last: ir.Node
    inputs: tuple[ir.Value, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    weight: Slot | None = None
    bias: Slot | None = None
    index: int = 0

    @property
    def output(self) -> ir.Value:
        """What the op computes."""
        return self.last.outputs[self.index]


def form_of(node: ir.Node, kind: Kind, *inputs: ir.Value, **attributes: Any) -> Form:
    first = node.inputs[0]
    assert first is not None
    return Form(kind, node, node, inputs or (first,), attributes)


def has_second_output(node: ir.Node) -> bool:
    """Whether anything reads another output than the first."""
    return any(output.uses() or output.is_graph_output() for output in node.outputs[1:])


def all_inputs(node: ir.Node) -> tuple[ir.Value, ...]:
    """Inputs, and what the bodies of If, Loop and Scan read of the graph around them."""
    found = [value for value in node.inputs if value is not None]
    for body in bodies(node):
        inner = [value for user in body.all_nodes() for value in user.inputs if value is not None]
        found += [value for value in (*inner, *body.outputs) if value.graph is node.graph]
    return tuple(dict.fromkeys(found))


def bodies(node: ir.Node) -> list[ir.Graph]:
    """The graphs among the node's attributes."""
    found: list[ir.Graph] = []
    for given in node.attributes.values():
        if given.type == ir.AttributeType.GRAPH:
            found.append(given.as_graph())
        elif given.type == ir.AttributeType.GRAPHS:
            found.extend(given.as_graphs())
    return found
