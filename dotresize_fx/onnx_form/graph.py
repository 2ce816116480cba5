"""The ONNX form of the neutral view: the main graph of an :class:`onnx_ir.Model` read and edited as a Graph.

A linear is one op however it is spelled: MatMul, with the Add of its bias; Gemm; either with a Transpose between it
and its constant. Ops and values go by the name of the output, which edits keep, since node names may repeat.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype

from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.onnx_form.attention import SpelledAttention, spelled_attentions
from dotresize_fx.onnx_form.axes import declared_width
from dotresize_fx.onnx_form.caches import find_caches
from dotresize_fx.onnx_form.constants import constant, is_constant_node, to_torch
from dotresize_fx.onnx_form.edits import OnnxEditor, all_values
from dotresize_fx.onnx_form.folding import fold_constants
from dotresize_fx.onnx_form.fused_ops import RMS_NORM_OPSET, put_together, take_apart
from dotresize_fx.onnx_form.heads import HeadEdits
from dotresize_fx.onnx_form.kinds import Form, bodies, read_form, shown_outputs
from dotresize_fx.onnx_form.linears import (
    BIASED,
    Slot,
    is_part_of_linear,
    plugged,
    slots,
    stored_transposed,
    wants_transposed,
    weight_readers,
)
from dotresize_fx.onnx_form.packed_linears import put_linears_together
from dotresize_fx.onnx_form.shapes import complete_shapes, refresh_widths, set_width
from dotresize_fx.onnx_form.symbolic_shapes import SymbolicShapes
from dotresize_fx.onnx_form.views import normalise_views

NUMBERED = "onnx::"


class OnnxGraph(HeadEdits, Graph):
    """The main graph of a model, topologically sorted as ONNX demands; calls of functions are ops not understood.

    Edits write to the model in place; fused ops that stand for several are taken apart. Parameters are initializers
    that are not graph inputs, and Constant nodes. A norm whose gain is all ones has none in the view, as ONNX's norms
    cannot leave it out.
    """

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

    def fused_model(self) -> ir.Model:
        """The model to be written: what was taken apart is put together again, where it still can be.

        Fused ops, and packed linears. It is another model over the same tensors: the graph stays as it is.
        """
        new = self.copy()
        new.remove_dead()
        put_linears_together(new._graph, new._editor, new.packings)
        put_together(new.model)
        return new._model

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

    def changed(self) -> None:
        super().changed()
        for name in ("_values", "_order", "_owners", "_attentions", "_inside"):
            self.__dict__.pop(name, None)

    def _value(self, value: ir.Value, *, transposed: bool = False) -> Value:
        tensor = constant(value)
        sizes = tensor.shape if tensor is not None else value.shape or ()
        shape = tuple(
            size if isinstance(size, int) else size.value or f"{value.name}[{i}]" for i, size in enumerate(sizes)
        )
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

    def _node(self, name: str) -> ir.Node:
        node = self._values[name].producer()
        if node is None:
            raise KeyError(name)
        return node

    def _form(self, op: Op) -> Form:
        return read_form(self._node(op.name), self._index(op.name))

    # -- editing -----------------------------------------------------------------------------------

    def set_weight(self, ops: Op | Sequence[Op], tensor: torch.Tensor) -> None:
        forms = [self._form(op) for op in ([ops] if isinstance(ops, Op) else ops)]
        self._editor.assign([form.weight for form in forms if form.weight is not None], tensor)
        for form in forms:
            if form.bias is not None:
                self._mark_bias(form)
            if form.kind in (Kind.LINEAR, Kind.EMBEDDING):
                width = tensor.shape[0 if form.kind is Kind.LINEAR else 1]
                set_width(form.core.outputs[0], width)
                self._set_output_width(form.last, width)
        self.changed()

    def set_parameter(self, value: Value, tensor: torch.Tensor) -> None:
        self._editor.assign(list(slots(self._values[value.name])), tensor)
        self.changed()

    def set_bias(self, op: Op, tensor: torch.Tensor | None) -> None:
        form = self._form(op)
        if form.kind not in (Kind.LINEAR, Kind.LAYER_NORM):
            raise ValueError(f"{op.name} ({op.kind}) can have no bias")
        self._mark_bias(form)
        if form.bias is not None and tensor is not None:
            self._editor.assign([form.bias], tensor)
        elif form.bias is not None:
            self._drop_bias(form)
        elif tensor is not None:
            name = op.name if op.weight is None else op.weight.name
            bias = self._editor.add_initializer(f"{name.rpartition('.')[0] or name}.bias", tensor)
            if form.core.op_type == "MatMul":
                product = form.core.outputs[0]
                output = self._editor.stand_in_for(product)
                self._editor.insert("Add", [product, bias], output, after=form.core)
            else:
                form.core.resize_inputs(3)
                form.core.replace_input_with(2, bias)
        self.changed()

    @staticmethod
    def _mark_bias(form: Form) -> None:
        """Weight and bias are set one after the other; between, their sizes do not say that they belong together."""
        form.core.meta[BIASED] = True

    def _drop_bias(self, form: Form) -> None:
        if form.core is form.last:
            form.core.resize_inputs(2)
            return
        self._editor.take_name(form.last.outputs[0], form.core.outputs[0])
        self._graph.remove(form.last, safe=True)

    def resize_norm(self, op: Op, width: int, epsilon: float) -> None:
        node = self._node(op.name)
        scale = constant(node.inputs[1])
        assert scale is not None
        self._editor.assign([(node, 1)], torch.ones(width, dtype=to_torch_dtype(scale.dtype)))
        node.resize_inputs(2)
        node.attributes.add(ir.AttrFloat32("epsilon", epsilon))
        self._set_output_width(node, width)
        self.changed()

    def drop_affine(self, op: Op) -> None:
        node = self._node(op.name)
        scale = constant(node.inputs[1])
        assert scale is not None
        self.resize_norm(op, int(scale.size), op.attributes["epsilon"])

    def resize_reshape(self, op: Op, width: int) -> None:
        node = self._node(op.name)
        declared = declared_width(node)
        assert declared is not None
        concat, sizes = declared
        if sizes[-1] > 0:
            new = self._editor.add_initializer(f"{op.name}_sizes", torch.tensor([*sizes[:-1], width]))
            if concat is not None:
                output = ir.val(self._editor.fresh(f"{op.name}_shape"), ir.DataType.INT64, concat.outputs[0].shape)
                inputs = [*concat.inputs[:-1], new]
                self._editor.insert("Concat", inputs, output, {"axis": 0}, before=node)
                new = output
            node.replace_input_with(1, new)
        self._set_output_width(node, width)
        self.changed()

    def insert_linear(
        self,
        source: Value,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        users: Iterable[Op] | None = None,
        name: str = "inserted",
        like: Op | None = None,
    ) -> Op:
        """See :meth:`Graph.insert_linear`; where ``source`` is an output of the graph, the output stays ``source``."""
        start = self._values[source.name]
        readers = {self._node(op.name) for op in (self.users(source) if users is None else users)}
        uses = [use for use in start.uses() if readers & set(self._readers(use.node))]
        shape = None if start.shape is None else ir.Shape([*start.shape[:-1], weight.shape[0]])
        outputs = [
            ir.val(self._editor.fresh(n), start.dtype, shape)
            for n in ([name] if bias is None else [name, f"{name}_product"])
        ]
        for node, index in uses:
            node.replace_input_with(index, outputs[0])
        stored = self._editor.add_initializer(f"{name}.weight", weight.T)
        last = self._editor.insert("MatMul", [start, stored], outputs[-1], after=start.producer())
        if bias is not None:
            shift = self._editor.add_initializer(f"{name}.bias", bias)
            last = self._editor.insert("Add", [outputs[1], shift], outputs[0], after=last)
        self._touched.add(outputs[0])
        self.changed()
        return self._read_op(last)

    def replace_with_rms_norm(self, last: Op, source: Value, gain: Value | None, epsilon: float) -> None:
        node, start = self._node(last.name), self._values[source.name]
        dtype = node.outputs[0].dtype or start.dtype
        if gain is None:
            assert dtype is not None
            assert source.width is not None
            ones = torch.ones(source.width, dtype=to_torch_dtype(dtype))
            scale = self._editor.add_initializer(f"{last.name}_gain", ones)
        else:
            scale = self._values[gain.name]
        self._replace_with_rms_norm(node, start, scale, epsilon)

    def make_rms_norm(self, op: Op) -> None:
        node = self._node(op.name)
        source, scale = node.inputs[:2]
        assert source is not None
        assert scale is not None
        self._replace_with_rms_norm(node, source, scale, op.attributes["epsilon"])

    def _replace_with_rms_norm(self, node: ir.Node, source: ir.Value, scale: ir.Value, epsilon: float) -> None:
        # Before it, ONNX Runtime's own SimplifiedLayerNormalization, which it registers under ONNX's domain, says the
        # same (onnx.checker does not know that op).
        modern = self._graph.opset_imports.get("", 1) >= RMS_NORM_OPSET
        name = "RMSNormalization" if modern else "SimplifiedLayerNormalization"
        output = self._editor.stand_in_for(node.outputs[0])
        new = self._editor.insert(name, [source, scale], output, {"axis": -1, "epsilon": epsilon}, before=node)
        new.meta.update(node.meta)  # what it was fused with
        self._graph.remove(node, safe=True)
        self.changed()

    def fold_constants(self, largest: int) -> list[str]:
        folded = fold_constants(self._graph, self._editor, largest)
        self.changed()
        return folded

    def normalise_views(self) -> list[str]:
        joined = normalise_views(self._graph, self._editor)
        self.changed()
        return joined

    def replace_with_linear(self, last: Op, source: Value, like: Op) -> None:
        """See :meth:`Graph.replace_with_linear`: a product of more than two axes with the weight of a Gemm."""
        node, gemm, start = self._node(last.name), self._node(like.name), self._values[source.name]
        weight, bias = gemm.inputs[1:3]
        assert weight is not None
        if not wants_transposed((gemm, 1)):
            turned = ir.val(self._editor.fresh(f"{weight.name}_transposed"), weight.dtype, weight.shape)
            weight = self._editor.insert("Transpose", [weight], turned, {"perm": [1, 0]}, before=gemm).outputs[0]
            weight.shape = ir.Shape(list(gemm.inputs[1].shape)[::-1])  # type: ignore[union-attr, arg-type]
        output = self._editor.stand_in_for(node.outputs[0])
        product = ir.val(self._editor.fresh(f"{output.name}_product"), output.dtype, output.shape)
        self._editor.insert("MatMul", [start, weight], product, before=node)
        self._editor.insert("Add", [product, bias], output, before=node)
        self._graph.remove(node, safe=True)
        self.changed()

    def bypass(self, op: Op) -> None:
        """See :meth:`Graph.bypass`; an output of the graph keeps its name and is then an Identity."""
        form = self._form(op)
        source = self._values[op.inputs[0].name]
        self._let_read(form, source)
        if not any(output.uses() or output.is_graph_output() for output in form.last.outputs):
            self._graph.remove({form.core, form.last}, safe=True)
        self._touched.add(source)
        self.changed()

    def redirect(self, op: Op, value: Value) -> None:
        """See :meth:`Graph.redirect`; an output of the graph keeps its name and is then an Identity."""
        self._let_read(self._form(op), self._values[value.name])
        self._touched.add(self._values[value.name])
        self.changed()

    def _let_read(self, form: Form, value: ir.Value) -> None:
        """Let what reads the op's output read ``value``, which is computed before it."""
        output = form.output
        for node, index in output.uses():
            node.replace_input_with(index, value)
        if output.is_graph_output():
            self._editor.insert("Identity", [value], self._editor.stand_in_for(output), before=form.last)

    def remove_dead(self) -> int:
        removed = 0
        for node in reversed(list(self._graph)):
            if not any(output.uses() or output.is_graph_output() for output in node.outputs):
                removed += self._is_visible(node)
                self._graph.remove(node, safe=True)
        for name, value in list(self._graph.initializers.items()):
            if not (value.uses() or value.is_graph_input() or value.is_graph_output()):
                del self._graph.initializers[name]
        self.changed()
        self.refresh_shapes()
        return removed

    def refresh_shapes(self) -> None:
        """Correct the shapes of what follows from edits; reading all ops or the model does so too."""
        if self._touched or self._moved:
            touched, self._touched, self._moved = self._touched, set(), False
            refresh_widths(self._graph, touched, self._is_visible)
            SymbolicShapes(self._graph).run()
            self.changed()

    def copy(self) -> OnnxGraph:
        new = OnnxGraph(self.model.clone())
        new.packings.update(self.packings)
        return new

    def _set_output_width(self, node: ir.Node, width: int) -> None:
        set_width(node.outputs[0], width)
        self._touched.add(node.outputs[0])
