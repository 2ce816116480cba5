"""One table for all sequences is repeated for each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
from onnx_ir.passes.common import ShapeInferencePass

from dotresize_fx.export.fit_rotary_tables import fit_rotary_tables

MODEL = """<ir_version: 10, opset_import: ["" : 23]>
g (float[b, 2, s, 6] x, float[b, 1, s, 6] y, float[{batch}, s, 3] cos, float[{batch}, s, 3] sin)
=> (float[b, 2, s, 6] rotated, float[b, 1, s, 6] other)
{{
    rotated = RotaryEmbedding(x, cos, sin)
    other = RotaryEmbedding(y, cos, sin)
}}"""


def graph(batch: str) -> onnx_ir.Model:
    return ShapeInferencePass()(onnx_ir.from_onnx_text(MODEL.format(batch=batch))).model


def test_a_batch_of_several_is_rotated(tmp_path: Path) -> None:
    model = graph("1")
    assert fit_rotary_tables(model) == 2
    assert [node.op_type for node in model.graph].count("Expand") == 2  # for both that are rotated
    path = tmp_path / "model.onnx"
    onnx.save(onnx_ir.to_proto(model), path)
    onnx.checker.check_model(str(path), full_check=True)
    draw = np.random.default_rng(0)
    x, y = (draw.normal(size=(3, heads, 4, 6)).astype(np.float32) for heads in (2, 1))
    cos, sin = (draw.normal(size=(1, 4, 3)).astype(np.float32) for _ in range(2))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x, "y": y, "cos": cos, "sin": sin})
    for rotated, given in zip(found, (x, y), strict=True):
        left, right = given[..., :3], given[..., 3:]
        expected = np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
        np.testing.assert_allclose(rotated, expected, rtol=0, atol=1e-6)  # float32's roundings


def test_tables_of_every_sequence_stay() -> None:
    assert fit_rotary_tables(graph("b")) == 0
