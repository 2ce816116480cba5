"""Weights of 8 and 4 bits: which, and how far off."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from dotresize_fx.export.onnx_session import OnnxModel
from dotresize_fx.export.quantize import quantize

pytest.importorskip("onnxruntime")

WIDTH, ROWS = 40, 70  # no multiples of a block


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """ids -> table rows -> @ square -> @ transposed table, with a product of two inputs' that holds no weight."""
    generator = np.random.default_rng(0)
    table = generator.standard_normal((ROWS, WIDTH)).astype(np.float32)
    square = generator.standard_normal((WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], name="pick"),
        helper.make_node("MatMul", ["rows", "square"], ["mixed"], name="mix"),
        helper.make_node("Transpose", ["table"], ["turned"], name="turn", perm=[1, 0]),
        helper.make_node("MatMul", ["mixed", "turned"], ["logits"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "tied",
        [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["b", "l"])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["b", "l", ROWS])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(square, "square")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "float32.onnx", save_as_external_data=True, location="w", size_threshold=100)
    return tmp_path / "float32.onnx"


@pytest.mark.parametrize(("kind", "within"), [("int8", 0.02), ("int4", 0.25)])
def test_a_tied_model(tied: Path, tmp_path: Path, kind: str, within: float) -> None:
    (folder := tmp_path / "out").mkdir()
    (work := tmp_path / "work").mkdir()
    before = (logging.getLogger().level, list(logging.getLogger().handlers), logging.root.manager.disable)
    found = quantize(tied, folder, kind, work)
    assert (logging.getLogger().level, list(logging.getLogger().handlers), logging.root.manager.disable) == before
    assert list(work.iterdir()) == []
    assert (found.linears, found.quantised) == (2, 2)
    model = onnx.load(found.path)
    ops = [node.op_type for node in model.graph.node]
    assert ops == ["GatherBlockQuantized" if kind == "int4" else "Gather", "MatMulNBits", "MatMulNBits"]
    assert ("table" in {tensor.name for tensor in model.graph.initializer}) == (kind == "int8")
    ids = np.arange(ROWS).reshape(2, -1)
    expected, actual = (OnnxModel(path)({"ids": ids})[0] for path in (tied, found.path))
    # Steps of a block's range: 1/255 and 1/15 of it, in weights and, of 8 bits, in activations.
    assert 0 < np.abs(actual - expected).max() < within * np.abs(expected).max()


def test_a_product_without_a_weight_is_left(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[4, 4] x) => (float[4, 4] y) { y = MatMul(x, x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "float32.onnx")
    (work := tmp_path / "work").mkdir()
    (folder := tmp_path / "out").mkdir()
    found = quantize(tmp_path / "float32.onnx", folder, "int4", work)
    assert (found.linears, found.quantised) == (0, 0)
    assert [node.op_type for node in onnx.load(found.path).graph.node] == ["MatMul"]
