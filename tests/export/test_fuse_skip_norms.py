"""The stream's sum and the norm behind it in one op."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from dotresize_fx.export.fuse_skip_norms import fuse_skip_norms

MODEL = """<ir_version: 10, opset_import: ["" : 23]>
g (float[b, s, 8] before, float[{update}] update) => (float[b, s, 8] out)
<float[8] gain = {{1, 2, 3, 4, 5, 6, 7, 8}}>
{{
    stream = Add(before, update)
    normed = RMSNormalization<axis = {axis}, epsilon = 0.1>(stream, gain)
    out = Mul(normed, stream)
}}"""


def graph(update: str = "b, s, 8", axis: int = -1) -> onnx_ir.Model:
    return ShapeInferencePass()(onnx_ir.from_onnx_text(MODEL.format(update=update, axis=axis))).model


def ran(model: onnx_ir.Model, folder: Path) -> np.ndarray:
    onnx.save(onnx_ir.to_proto(model), folder / "model.onnx")
    draw = np.random.default_rng(0)
    inputs = {name: draw.normal(size=(2, 3, 8)).astype(np.float32) for name in ("before", "update")}
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def test_sum_and_norm_are_one(tmp_path: Path) -> None:
    model = graph()
    expected = ran(model, tmp_path)
    assert fuse_skip_norms(model) == 1
    assert [node.op_type for node in model.graph] == ["SkipSimplifiedLayerNormalization", "Mul"]
    np.testing.assert_allclose(ran(model, tmp_path), expected, rtol=1e-5, atol=1e-6)  # float32's roundings


@pytest.mark.parametrize("other", [{"update": "8"}, {"axis": 1}])
def test_a_bias_and_a_norm_over_more_than_the_width_are_not(other: dict[str, object]) -> None:
    assert fuse_skip_norms(graph(**other)) == 0  # type: ignore[arg-type]
