"""The ONNX form of the neutral view: the main graph of an :class:`onnx_ir.Model` read and edited as a Graph.

A linear is one op however it is spelled: MatMul, with the Add of its bias; Gemm; either with a Transpose between it
and its constant. Ops and values go by the name of the output, which edits keep, since node names may repeat.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype

from dotresize_fx.graph import Kind, Op, Value
from dotresize_fx.onnx_form.axes import declared_width
from dotresize_fx.onnx_form.constants import constant
from dotresize_fx.onnx_form.folding import fold_constants
from dotresize_fx.onnx_form.form import Form
from dotresize_fx.onnx_form.fused_ops import RMS_NORM_OPSET, put_together
from dotresize_fx.onnx_form.layers import LayerEdits
from dotresize_fx.onnx_form.linears import (
    BIASED,
    slots,
    wants_transposed,
)
from dotresize_fx.onnx_form.packed_linears import put_linears_together
from dotresize_fx.onnx_form.shapes import set_width
from dotresize_fx.onnx_form.views import normalise_views


class OnnxGraph(LayerEdits):
    """The main graph of a model, topologically sorted as ONNX demands; calls of functions are ops not understood.

    Edits write to the model in place; fused ops that stand for several are taken apart. Parameters are initializers
    that are not graph inputs, and Constant nodes. A norm whose gain is all ones has none in the view, as ONNX's norms
    cannot leave it out.
    """

    def fused_model(self) -> ir.Model:
        """The model to be written: what was taken apart is put together again, where it still can be.

        Fused ops, and packed linears. It is another model over the same tensors: the graph stays as it is.
        """
        new = self.copy()
        new.remove_dead()
        put_linears_together(new._graph, new._editor, new.packings)
        put_together(new.model)
        return new._model

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
        self._editor.assign(list(slots(self._values[value.name])), tensor, as_stored=True)
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
        if (source.dtype, scale.dtype) == (ir.DataType.FLOAT, ir.DataType.BFLOAT16):
            # ONNX Runtime has no kernel for the two together; it rounds either way, before the norm or behind it.
            rounded = ir.val(self._editor.fresh(f"{source.name}_rounded"), scale.dtype, source.shape)
            self._editor.insert("Cast", [source], rounded, {"to": int(ir.DataType.BFLOAT16)}, before=node)
            source = rounded
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

    def copy(self) -> OnnxGraph:
        new = OnnxGraph(self.model.clone())
        new.packings.update(self.packings)
        return new

    def _set_output_width(self, node: ir.Node, width: int) -> None:
        set_width(node.outputs[0], width)
        self._touched.add(node.outputs[0])
