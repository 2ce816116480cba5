"""GroupQueryAttention over one packed tensor: a Split in front of it, and none again; reshapes that are taken back."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from dotresize_fx.onnx_form.edits import OnnxEditor
from dotresize_fx.onnx_form.fused_ops import put_together, take_apart
from dotresize_fx.onnx_form.shapes import complete_shapes
from dotresize_fx.onnx_form.symbolic_shapes import SymbolicShapes
from dotresize_fx.onnx_form.views import normalise_views

PACKED = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
m (float[b, l, WIDTH] x, float[b, 2, p, 16] k, float[b, 2, p, 16] v, int32[b] s, int32 t) => (float[b, l, 64] y) {
    y, pk, pv = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (x, , , k, v, s, t)
}"""
VIEWS = """<ir_version: 10, opset_import: ["" : 20]>
m (float[b, l, 32] x) => (float[b, l, width] y) <int64[4] heads = {0, 0, 4, -1}, int64[COUNT] back = {SIZES}> {
    a = Reshape(x, heads)
    c = Reshape(a, back)
    y = Relu(c)
}"""


def listed(model: ir.Model) -> list[str]:
    return [
        f"{', '.join(v.name or '' for v in node.outputs)} = {node.op_type}"
        f"({', '.join(v.name or '' if v is not None else '' for v in node.inputs)})"
        for node in model.graph
    ]


def test_a_split_stands_in_front_while_it_is_edited() -> None:
    model = ir.from_proto(onnx.parser.parse_model(PACKED.replace("WIDTH", "128")))
    before = listed(model)
    assert take_apart(model) == 1
    assert listed(model) == [
        "y_query, y_key, y_value = Split(x, y_sizes)",
        "y, pk, pv = GroupQueryAttention(y_query, y_key, y_value, k, v, s, t)",
    ]
    assert [part.shape[-1] for part in model.graph[0].outputs if part.shape is not None] == [64, 32, 32]
    assert put_together(model.clone()) == 1
    put_together(model)
    assert listed(model) == before
    assert not model.graph.initializers


def test_a_width_that_is_no_whole_number_of_heads_stays_packed() -> None:
    model = ir.from_proto(onnx.parser.parse_model(PACKED.replace("WIDTH", "100")))
    assert take_apart(model) == 0


@pytest.mark.parametrize(("sizes", "undone"), [("0, 0, 32", True), ("0, 0, -1", True), ("0, 0, 2, 16", False)])
def test_a_reshape_that_takes_another_back_is_read_through(sizes: str, undone: bool) -> None:
    text = VIEWS.replace("COUNT", str(sizes.count(",") + 1)).replace("SIZES", sizes)
    model = ir.from_proto(onnx.parser.parse_model(text))
    complete_shapes(model)
    SymbolicShapes(model.graph).run()
    assert bool(normalise_views(model.graph, OnnxEditor(model))) == undone
    assert listed(model)[-1] == ("y = Relu(x)" if undone else "y = Relu(c)")
