"""How the neutral view reads an ONNX graph: ops, values, weights, by the name of what is computed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import onnx_ir as ir
import torch

from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.onnx_form.attention import SpelledAttention, spelled_attentions
from dotresize_fx.onnx_form.caches import find_caches
from dotresize_fx.onnx_form.constants import constant, is_constant_node, to_torch
from dotresize_fx.onnx_form.details import details
from dotresize_fx.onnx_form.edits import OnnxEditor, all_values
from dotresize_fx.onnx_form.form import Form, bodies
from dotresize_fx.onnx_form.fused_ops import take_apart
from dotresize_fx.onnx_form.kinds import read_form, shown_outputs
from dotresize_fx.onnx_form.linears import (
    Slot,
    is_part_of_linear,
    plugged,
    stored_transposed,
    weight_readers,
)
from dotresize_fx.onnx_form.shapes import complete_shapes, refresh_widths
from dotresize_fx.onnx_form.sizes import sizes_of
from dotresize_fx.onnx_form.symbolic_shapes import SymbolicShapes

NUMBERED = "onnx::"  # how TorchScript names a weight that it turned round


class OnnxReading(Graph):
    """What :class:`dotresize_fx.onnx_form.graph.OnnxGraph` reads."""

    def __init__(self, model: ir.Model) -> None:
        take_apart(model)
        complete_shapes(model)
        SymbolicShapes(model.graph).run()
        self._model = model
        self._touched: set[ir.Value] = set()  # values whose width changed, and whose users' shapes are stale
        self._moved = False  # whether sizes of other axes changed too
        self._editor = OnnxEditor(model)
        self.caches.update(find_caches(model.graph))

    @property
    def model(self) -> ir.Model:
        """The model itself, its shapes up to date."""
        self.refresh_shapes()
        return self._model

    @property
    def _graph(self) -> ir.Graph:
        return self._model.graph

    # -- reading -----------------------------------------------------------------------------------

    @cached_property
    def _values(self) -> dict[str | None, ir.Value]:
        return {value.name: value for value in all_values(self._graph)}

    @cached_property
    def _order(self) -> dict[ir.Node, int]:
        return {node: i for i, node in enumerate(self._graph)}

    @cached_property
    def _owners(self) -> dict[ir.Graph, ir.Node]:
        """Body of an If, Loop or Scan -> the node of the main graph that it belongs to, however deep."""
        return {graph: node for node in self._graph for body in bodies(node) for graph in (body, *body.subgraphs())}

    @cached_property
    def _attentions(self) -> dict[ir.Node, SpelledAttention]:
        """By the product of weights and values that ends them."""
        return {found.mixing: found for found in spelled_attentions(self._graph)}

    @cached_property
    def _inside(self) -> dict[ir.Node, ir.Node]:
        """Nodes that the view shows only as part of an attention -> the product that ends it."""
        return {node: found.mixing for found in self._attentions.values() for node in found.inside}

    @property
    def parts_of_attentions(self) -> list[ir.Node]:
        """The nodes that the view shows only as part of an attention."""
        return list(self._inside)

    def changed(self) -> None:
        super().changed()
        for name in ("_values", "_order", "_owners", "_attentions", "_inside"):
            self.__dict__.pop(name, None)

    def _value(self, value: ir.Value, *, transposed: bool = False) -> Value:
        tensor = constant(value)
        shape = tuple(tensor.shape.numpy()) if tensor is not None else sizes_of(value) or ()
        return Value(str(value.name), shape[::-1] if transposed else shape, tensor is not None)

    def _owned(self, slot: Slot | None) -> Value | None:
        return None if slot is None else self._value(plugged(slot), transposed=stored_transposed(slot))

    def _is_visible(self, node: ir.Node) -> bool:
        return not is_constant_node(node) and not is_part_of_linear(node) and node not in self._inside

    def _read_op(self, node: ir.Node, index: int = 0) -> Op:
        form = read_form(node, index)
        spelled = self._attentions.get(node)
        if spelled is not None:
            whole = {"turned": True} if spelled.query is not None else {"mixes": True}
            attributes = {"scale": 1.0, "grouped": False, **whole}
            form = Form(Kind.ATTENTION, node, node, spelled.inputs, attributes)
        output = self._value(form.output)
        inputs = tuple(self._value(value) for value in form.inputs)
        weight, bias = self._owned(form.weight), self._owned(form.bias)
        return Op(output.name, form.kind, inputs, output, weight, bias, form.attributes, form.core.op_type)

    def _read_ops(self) -> list[Op]:
        self.refresh_shapes()
        return [self._read_op(node, i) for node in self._graph if self._is_visible(node) for i in shown_outputs(node)]

    def _read_outputs(self) -> frozenset[Value]:
        return frozenset(self._value(value) for value in self._graph.outputs)

    # One op is read without reading the whole graph, so that a long row of edits stays cheap.

    def op(self, name: str) -> Op:
        return self._read_op(self._node(name), self._index(name))

    def producer(self, value: Value) -> Op | None:
        node = self._values[value.name].producer()
        return None if node is None or is_constant_node(node) else self._read_op(node, self._index(value.name))

    def _index(self, name: str) -> int:
        """Which of the ops that the view shows of a node computes this value; of most there is one."""
        value = self._values[name]
        node, index = value.producer(), value.index() or 0
        return index if node is not None and index in shown_outputs(node) else 0

    def users(self, value: Value) -> list[Op]:
        nodes = {reader for use in self._values[value.name].uses() for reader in self._readers(use.node)}
        ordered = sorted(nodes, key=self._order.__getitem__)
        ops = [self._read_op(node, index) for node in ordered for index in shown_outputs(node)]
        # Not an op that sees only the leading sizes, or that has the constant as its number.
        return [op for op in ops if value in (*op.inputs, op.weight, op.bias)]

    def _readers(self, node: ir.Node) -> Iterator[ir.Node]:
        """The nodes of ops through which the view shows that ``node`` reads something."""
        graph = node.graph
        node = node if graph is self._graph or graph is None else self._owners[graph]
        return weight_readers(self._inside.get(node, node))

    def parameter(self, value: Value) -> torch.Tensor:
        tensor = constant(self._values[value.name])
        assert tensor is not None
        return to_torch(tensor)

    def is_buffer(self, value: Value) -> bool:
        tensor = constant(self._values[value.name])
        return tensor is not None and not tensor.dtype.is_floating_point()

    def beside(self, op: Op) -> tuple[Value, ...]:
        node = self._node(op.name)
        shown = shown_outputs(node)
        return tuple(self._value(output) for i, output in enumerate(node.outputs) if i not in shown and output.uses())

    def details(self, op: Op) -> tuple[object, ...]:
        if op.kind not in (Kind.ATTENTION, Kind.POINTWISE, Kind.OTHER):
            return ()  # the view tells all of them, whatever defaults the file states
        node, form = self._node(op.name), self._form(op)
        nodes = {node, form.core, *(inner for inner, mixing in self._inside.items() if mixing is node)}
        shown = {value.name for value in (*op.inputs, op.weight, op.bias) if value is not None}
        return details(sorted(nodes, key=self._order.__getitem__), shown)

    def parameter_name(self, value: Value) -> str:
        """Its name; a weight that TorchScript turned and numbered goes by the module of the node that reads it."""
        if not value.name.startswith(NUMBERED):
            return value.name
        uses = [use for use in self._values[value.name].uses() if (use.node.name or "").startswith("/")]
        module = str(uses[0].node.name).strip("/").rpartition("/")[0] if len(uses) == 1 else ""
        return f"{module.replace('/', '.')}.weight" if module else value.name

    def _read_weight(self, op: Op) -> torch.Tensor:
        slot = self._form(op).weight
        assert slot is not None
        assert op.weight is not None
        stored = self.parameter(op.weight)
        return stored.T if stored_transposed(slot) else stored

    def shape_of(self, name: str) -> tuple[int | str, ...]:
        """Of a value of this name; empty where it is not known."""
        return self._value(self._values[name]).shape

    def as_stored(self, op: Op, weight: torch.Tensor) -> torch.Tensor:
        """A weight of the view's orientation as the op's constant has it."""
        slot = self._form(op).weight
        assert slot is not None
        return weight.T if stored_transposed(slot) else weight

    def _node(self, name: str) -> ir.Node:
        node = self._values[name].producer()
        if node is None:
            raise KeyError(name)
        return node

    def _form(self, op: Op) -> Form:
        return read_form(self._node(op.name), self._index(op.name))

    def refresh_shapes(self) -> None:
        """Correct the shapes of what follows from edits; reading all ops or the model does so too."""
        if self._touched or self._moved:
            touched, self._touched, self._moved = self._touched, set(), False
            refresh_widths(self._graph, touched, self._is_visible)
            SymbolicShapes(self._graph).run()
            self.changed()
