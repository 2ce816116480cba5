"""Edits of an ONNX graph's nodes and initializers that keep every name that is seen from outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir
import torch

from dotresize_fx.onnx_form.constants import from_torch
from dotresize_fx.onnx_form.linears import (
    Slot,
    is_transposed_weight,
    plugged,
    slots,
    stored_transposed,
    wants_transposed,
)


class OnnxEditor:
    """Adds to and rewires the main graph of a model; it knows which names are taken."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self._taken = {value.name for graph in model.graphs() for value in all_values(graph)}

    def fresh(self, name: str) -> str:
        """A name that nothing in the model has or had."""
        unique, counter = name, 1
        while unique in self._taken:
            unique, counter = f"{name}_{counter}", counter + 1
        self._taken.add(unique)
        return unique

    def insert(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        output: ir.Value,
        attributes: Mapping[str, int | float | Sequence[int]] | None = None,
        *,
        before: ir.Node | None = None,
        after: ir.Node | None = None,
    ) -> ir.Node:
        """A new node that computes ``output``; at the start of the graph where neither place is given."""
        node = ir.node(op_type, inputs, attributes, outputs=[output], name=output.name)
        if after is not None:
            self.graph.insert_after(after, node)
        else:
            self.graph.insert_before(before if before is not None else self.graph[0], node)
        return node

    def stand_in_for(self, value: ir.Value) -> ir.Value:
        """A new value, still without a node, that is read in place of ``value`` and has its name."""
        new = ir.val(None, value.dtype, value.shape.copy() if value.shape is not None else None)
        new.metadata_props.update(value.metadata_props)
        self.take_name(value, new)
        return new

    def take_name(self, old: ir.Value, new: ir.Value) -> None:
        """Let everything that reads ``old`` read ``new``, which takes its name over."""
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = self.fresh(f"{name}_before")
        new.name = name
        if (node := old.producer()) is not None and node.name == name:  # as nodes that were put in are called
            node.name = old.name

    def add_initializer(self, name: str | None, tensor: torch.Tensor) -> ir.Value:
        value = ir.Value(name=self.fresh(str(name)))
        _store(value, tensor)
        self.graph.register_initializer(value)
        return value

    def assign(self, chosen: list[Slot], tensor: torch.Tensor, *, as_stored: bool = False) -> None:
        """Plug a tensor of the view's orientation, or of the constant's, into the slots; whatever else has their
        constant keeps it.
        """
        value, transposed = plugged(chosen[0]), stored_transposed(chosen[0])
        stored = tensor.T if transposed and not as_stored else tensor
        private = value.is_initializer() and not value.is_graph_output() and slots(value) == set(chosen)
        if private:
            _store(value, stored)
            return
        new = self.add_initializer(value.name, stored)
        for node, index in chosen:
            plug = new
            if wants_transposed((node, index)) != transposed:
                plug = ir.val(self.fresh(f"{new.name}_transposed"), new.dtype, tuple(stored.shape[::-1]))
                self.insert("Transpose", [new], plug, {"perm": [1, 0]}, before=node)
            node.replace_input_with(index, plug)


def _store(value: ir.Value, tensor: torch.Tensor) -> None:
    """Give an initializer another tensor. Tensors are replaced, never written to: copies of a graph share them."""
    constant = from_torch(tensor, value.name)
    value.const_value, value.shape = constant, ir.Shape(tuple(tensor.shape))
    value.type = ir.TensorType(constant.dtype)
    for node, _ in value.uses():
        if is_transposed_weight(node):
            node.outputs[0].shape = ir.Shape(tuple(tensor.shape[::-1]))


def all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Inputs, initializers and what the nodes compute."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
