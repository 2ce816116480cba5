"""Parts of one computed table are taken out of it at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from dotresize_fx.export.join_table_gathers import join_table_gathers

MODEL = """<ir_version: 10, opset_import: ["" : 20]>
g (float[b, s, 6] angles) => (float[b, s, 3] first, float[b, s, 2] second, float[b, s, 6] rest)
<int64[3] three = {5, 0, 2}, int64[2] two = {1, 0}> {
    table = Cos(angles)
    a = Gather <axis = AXIS> (table, three)
    b = Gather <axis = AXIS> (table, two)
    first = Neg(a)
    second = Neg(b)
    rest = Abs(table)
}"""


def graph(text: str) -> onnx_ir.Model:
    return ShapeInferencePass()(onnx_ir.from_onnx_text(text)).model


@pytest.mark.parametrize("axis", ["-1", "2"])
def test_two_parts_are_one_gather_and_a_split(tmp_path: Path, axis: str) -> None:
    model = graph(MODEL.replace("AXIS", axis))
    assert join_table_gathers(model) == 1
    assert [node.op_type for node in model.graph] == ["Cos", "Gather", "Split", "Neg", "Neg", "Abs"]
    path = tmp_path / "model.onnx"
    onnx.save(onnx_ir.to_proto(model), path)
    onnx.checker.check_model(str(path), full_check=True)
    angles = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    first, second, _ = session.run(None, {"angles": angles})
    np.testing.assert_allclose(first, -np.cos(angles)[..., [5, 0, 2]], rtol=0, atol=1e-6)  # float32's roundings
    np.testing.assert_allclose(second, -np.cos(angles)[..., [1, 0]], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "second",
    ["Relu(table)", "Gather <axis = -1> (other, two)", "Gather <axis = 1> (table, two)"],
    ids=["one part alone", "of another value", "along another axis"],
)
def test_others_stay(second: str) -> None:
    text = MODEL.replace("b = Gather <axis = AXIS> (table, two)", f"other = Abs(table)\n    b = {second}")
    text = text.replace("AXIS", "-1").replace("float[b, s, 2] second", "float[d, e, f] second")
    assert join_table_gathers(graph(text)) == 0
