"""Ops of ONNX Runtime that stand for several: taken apart to be read and edited, and put together again to be written.

A sum with the norm behind it, and a bias with the activation behind it, are each a writer's end and a reader's
beginning at once; apart they are ops that ONNX has too. What every part came from is noted in its node's meta, which
copies of a model keep.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from dotresize_fx.onnx_form.constants import is_weight
from dotresize_fx.onnx_form.edits import OnnxEditor
from dotresize_fx.onnx_form.linears import is_linear
from dotresize_fx.onnx_form.packed_attention import holds_weights, put_attention_together, take_attention_apart
from dotresize_fx.onnx_form.packed_heads import UNPACKED, pack_heads, packs_heads, unpack_heads

DOMAIN = "com.microsoft"
# In a node's meta: the output's name of the fused op that it was a part of, and for its last part the node itself.
PART = "dotresize_fx.part_of"
WHOLE = "dotresize_fx.fused"
RMS_NORM_OPSET = 23  # the first that has RMSNormalization
GELU_OPSET = 20  # the first that has Gelu
SKIP_NORMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
BIASED_GELUS = ("BiasGelu", "FastGelu")


def take_apart(model: ir.Model) -> int:
    """Replace each fused op of the main graph by its parts; returns how many. One whose statistics are read stays.

    before::

        normed, , , total = SkipLayerNormalization(x, skip, gain, bias, shift)
        active = BiasGelu(y, shift)

    after::

        shifted = Add(x, shift)
        total = Add(shifted, skip)
        normed = LayerNormalization(total, gain, bias)
        shifted = Add(y, shift)
        active = Gelu(shifted)
    """
    fused = [node for node in model.graph if node.domain == DOMAIN and _is_fused(node)]
    if fused:
        editor = OnnxEditor(model)
        for node in fused:
            if packs_heads(node):
                unpack_heads(model.graph, editor, node)
            else:
                _Apart(model, editor, node).run()
    return len(fused)


def _is_fused(node: ir.Node) -> bool:
    return _is_skip_norm(node) or _is_biased_gelu(node) or holds_weights(node) or packs_heads(node)


def _is_skip_norm(node: ir.Node) -> bool:
    statistics = any(output.uses() or output.is_graph_output() for output in node.outputs[1:3])
    return node.op_type in SKIP_NORMS and len(node.inputs) > 2 and None not in node.inputs[:3] and not statistics


def _is_biased_gelu(node: ir.Node) -> bool:
    return node.op_type in BIASED_GELUS and len(node.inputs) == 2 and None not in node.inputs


class _Apart:
    def __init__(self, model: ir.Model, editor: OnnxEditor, node: ir.Node) -> None:
        self.editor, self.node, self.graph = editor, node, model.graph
        self.opset = model.graph.opset_imports.get("", 1)
        self.mark = node.outputs[0].name

    def run(self) -> None:
        node = self.node
        if node.op_type in SKIP_NORMS:
            self._skip_norm()
        elif holds_weights(node):
            made = take_attention_apart(self.graph, self.editor, node)
            made[-1].meta[WHOLE] = node
            for new in made:
                self._insert(new)
        else:
            shifted = self._add(node.inputs[0], node.inputs[1], "shifted")
            tanh = node.op_type == "FastGelu"
            modern = self.opset >= GELU_OPSET
            name = "Gelu" if modern or not tanh else "FastGelu"
            attributes = (ir.AttrString("approximate", "tanh"),) if modern and tanh else ()
            self._last(name, [shifted], attributes, domain="" if modern else DOMAIN)
        self.graph.remove(node, safe=True)

    def _skip_norm(self) -> None:
        node = self.node
        simple = node.op_type != "SkipLayerNormalization"
        x, skip, gain, *rest = node.inputs
        bias = None if simple or not rest else rest[0]
        shift = next((value for value in rest[0 if simple else 1 :] if value is not None), None)
        if shift is not None:
            # Whose bias it is decides nothing but the report's names: a linear's that has none yet, if there is one.
            first = not _ends_bare_linear(skip) or _ends_bare_linear(x)
            x, skip = (self._add(x, shift, "shifted"), skip) if first else (x, self._add(skip, shift, "shifted"))
        total = self._add(x, skip, "total", node.outputs[3] if len(node.outputs) > 3 else None)
        name = "LayerNormalization"
        if simple:
            name = "RMSNormalization" if self.opset >= RMS_NORM_OPSET else "SimplifiedLayerNormalization"
        given = node.attributes.get("epsilon")
        epsilon = 1e-12 if given is None else given.as_float()
        inputs = [total, gain] if bias is None else [total, gain, bias]
        self._last(name, inputs, (ir.AttrFloat32("epsilon", epsilon), ir.AttrInt64("axis", -1)))

    def _add(self, one: ir.Value | None, other: ir.Value | None, word: str, old: ir.Value | None = None) -> ir.Value:
        """A sum, in place of the fused op's output ``old`` where that is named."""
        assert one is not None
        assert other is not None
        if old is not None and (old.name or old.uses()):
            output = self.editor.stand_in_for(old)
        else:
            like = self.node.outputs[0]
            output = ir.val(self.editor.fresh(f"{like.name}_{word}"), like.dtype or one.dtype, _shape(like))
        self._insert(ir.node("Add", [one, other], outputs=[output], name=output.name))
        return output

    def _last(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr], domain: str = ""
    ) -> None:
        node = self.node
        output = self.editor.stand_in_for(node.outputs[0])
        new = ir.Node(domain, op_type, inputs, attributes, outputs=[output], name=node.name)
        new.metadata_props.update(node.metadata_props)
        new.meta[WHOLE] = node
        self._insert(new)

    def _insert(self, new: ir.Node) -> None:
        new.meta[PART] = self.mark
        self.graph.insert_before(self.node, new)


def _shape(value: ir.Value) -> ir.Shape | None:
    return None if value.shape is None else value.shape.copy()


def _ends_bare_linear(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "MatMul" and is_linear(producer)


def put_together(model: ir.Model) -> int:
    """Put parts that :func:`take_apart` made together again where they still stand together; returns how many."""
    joined = 0
    for node in [node for node in model.graph if WHOLE in node.meta]:
        whole = node.meta[WHOLE]
        if whole.op_type in SKIP_NORMS:
            joined += _join_skip_norm(node, whole)
        elif whole.op_type in BIASED_GELUS:
            joined += _join_gelu(node, whole)
        else:
            joined += put_attention_together(model.graph, node, whole)
    for node in [node for node in model.graph if UNPACKED in node.meta]:
        joined += pack_heads(model.graph, node)
    return joined


def _join_gelu(gelu: ir.Node, whole: ir.Node) -> bool:
    shifted = _part(gelu, gelu.inputs[0])
    if shifted is None or not _is_private(shifted.outputs[0]) or not is_weight(shifted.inputs[1], 1):
        return False
    _replace(whole, whole.op_type, [*shifted.inputs], {0: gelu.outputs[0]}, [gelu, shifted])
    return True


def _join_skip_norm(norm: ir.Node, whole: ir.Node) -> bool:
    total = _part(norm, norm.inputs[0])
    if total is None:
        return False
    terms, parts, shift = list(total.inputs), [norm, total], None
    for index, term in enumerate(total.inputs):
        shifted = _part(norm, term)
        if (
            shift is None
            and shifted is not None
            and _is_private(shifted.outputs[0])
            and is_weight(shifted.inputs[1], 1)
        ):
            terms[index], shift = shifted.inputs
            parts.append(shifted)
    gain, bias = norm.inputs[1], norm.inputs[2] if len(norm.inputs) > 2 else None
    if any(value is not None and value.producer() is not None for value in (gain, bias, shift)):
        return False  # they may be computed behind the sum
    simple = norm.op_type != "LayerNormalization"
    inputs = [*terms, gain, shift] if simple else [*terms, gain, bias, shift]
    while inputs[-1] is None:
        inputs.pop()
    stream = total.outputs[0]
    kept = {0: norm.outputs[0]}
    if not _is_private(stream) or len(whole.outputs) > 3:
        kept[3] = stream
    _replace(whole, "SkipSimplifiedLayerNormalization" if simple else "SkipLayerNormalization", inputs, kept, parts)
    return True


def _part(node: ir.Node, value: ir.Value | None) -> ir.Node | None:
    """The sum that computes a value, where both came of one fused op."""
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "Add" or producer.meta.get(PART) != node.meta.get(PART):
        return None
    return producer


def _is_private(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _replace(
    whole: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], kept: dict[int, ir.Value], parts: list[ir.Node]
) -> None:
    """Compute the values ``kept``, by their places among its outputs, by one op; its place is behind the sum."""
    graph, epsilon = parts[0].graph, parts[0].attributes.get("epsilon")
    assert graph is not None
    outputs = []
    for index in range(max(len(whole.outputs), max(kept) + 1)):
        old = kept.get(index)
        unread = whole.outputs[index].name if index < len(whole.outputs) else ""
        outputs.append(ir.val(unread) if old is None else ir.val(old.name, old.dtype, _shape(old)))
        if old is not None:
            outputs[index].metadata_props.update(old.metadata_props)
    attributes = {name: given for name, given in whole.attributes.items() if epsilon is None or name != "epsilon"}
    new = ir.Node(DOMAIN, op_type, inputs, attributes.values(), outputs=outputs, name=whole.name)
    if epsilon is not None:
        new.attributes.add(epsilon)
    new.metadata_props.update(whole.metadata_props)
    graph.insert_after(parts[1], new)
    for index, old in kept.items():
        name = old.name
        old.replace_all_uses_with(outputs[index], replace_graph_outputs=True)
        old.name, outputs[index].name = f"{name}_before", name
    graph.remove(parts, safe=True)
