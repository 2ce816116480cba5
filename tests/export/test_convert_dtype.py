"""A float32 file in half precision: what is rounded, what is not, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from dotresize_fx.errors import UsageError
from dotresize_fx.export.convert_dtype import convert_dtype
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.onnx_session import OnnxModel

pytest.importorskip("onnxruntime")

HEAD = '<ir_version: 10, opset_import: ["" : 20]>'
NORM = """ g (float[b, 4] x) => (float[b, 4] y)
<float two = {2}, float epsilon = {1e-6}, int64[1] axes = {1}, float[4] gain = {1, 2, 3, 4}>
{
    squares = Pow(x, two)
    mean = ReduceMean(squares, axes)
    above = Add(mean, epsilon)
    root = Sqrt(above)
    inverse = Reciprocal(root)
    bare = Mul(x, inverse)
    y = Mul(bare, gain)
}"""


def convert(
    text: str, folder: Path, dtype: str = "float16", *, exact_stream: bool = False
) -> tuple[onnx.ModelProto, Path]:
    onnx.save(onnx.parser.parse_model(HEAD + text), folder / "float32.onnx")
    path = convert_dtype(folder / "float32.onnx", folder, dtype, exact_stream=exact_stream)
    onnx.checker.check_model(str(path), full_check=True)  # types inferred all through
    return onnx.load(path), path


def readable(model: onnx.ModelProto) -> list[str]:
    return [f"{', '.join(n.output)} = {n.op_type}({', '.join(n.input)})" for n in model.graph.node]


def test_a_norm_is_float32_but_for_its_gain(tmp_path: Path) -> None:
    model, path = convert(NORM, tmp_path)
    assert readable(model) == [
        "x_to_float = Cast(x)",
        "squares = Pow(x_to_float, two)",
        "mean = ReduceMean(squares, axes)",
        "above = Add(mean, epsilon)",
        "root = Sqrt(above)",
        "inverse = Reciprocal(root)",
        "bare = Mul(x_to_float, inverse)",
        "bare_to_float16 = Cast(bare)",
        "y = Mul(bare_to_float16, gain)",
    ]
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kinds == {"two": 1, "epsilon": 1, "axes": 7, "gain": TensorProto.FLOAT16}
    # Squares of 1000 are beyond float16; an epsilon of 1e-6 is below its normal numbers.
    for scale in (1e3, 1e-2):
        x = scale * np.array([[1, 2, -3, 4]], np.float32)
        expected = x / np.sqrt((x**2).mean() + 1e-6) * [1, 2, 3, 4]
        np.testing.assert_allclose(OnnxModel(path)({"x": x})[0], expected, rtol=3e-3)  # three roundings of 2**-11


STREAM = """ g (float[b, 4] x) => (float[b, 4] y)
<float[4, 4] weight = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}, float[4] bias = {0, 0, 0, 1},
 float[4] gain = {1, 1, 1, 1}>
{
    one = LayerNormalization(x, gain)
    product = MatMul(one, weight)
    first = Add(product, bias)
    stream = Add(x, first)
    two = LayerNormalization(stream, gain)
    second = MatMul(two, weight)
    last = Add(stream, second)
    y = LayerNormalization(last, gain)
}"""


def test_a_residual_stream_is_rounded_or_not(tmp_path: Path) -> None:
    """Sums of the stream and the norms that read them; products stay as they are."""
    for exact in (False, True):
        model, _ = convert(STREAM, tmp_path, exact_stream=exact)
        kinds = {
            v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(model).graph.value_info
        }
        wanted = TensorProto.FLOAT if exact else TensorProto.FLOAT16
        assert {kinds[name] for name in ("one", "two", "stream", "last")} == {wanted}
        assert {kinds[name] for name in ("product", "second")} == {TensorProto.FLOAT16}
        # With its bias a product is added where it is read.
        assert kinds["first"] == wanted


def test_scores_are_float32_with_the_mask_that_is_added(tmp_path: Path) -> None:
    model, path = convert(
        """ g (float[b, 4] q, bool[b, 4] hidden) => (float[b, 4] y) <float least = {-3.4e38}>
        {
            mask = Cast<to = 1>(hidden)
            added = Mul(mask, least)
            scores = MatMul(q, weight)
            masked = Add(scores, added)
            y = Softmax(masked)
        }""".replace("<float least", "<float[4, 4] weight = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}, float least"),
        tmp_path,
    )
    assert "masked = Add(scores_to_float, added)" in readable(model)
    assert next(tensor for tensor in model.graph.initializer if tensor.name == "least").data_type == TensorProto.FLOAT
    hidden = np.array([[True, True, True, True], [False, False, True, True]])
    (found,) = OnnxModel(path)({"q": np.zeros((2, 4), np.float32), "hidden": hidden})
    np.testing.assert_array_equal(found, np.float16([[0.25] * 4, [0.5, 0.5, 0, 0]]))  # all hidden: no NaN


def test_angles_are_float32_from_the_positions_on(tmp_path: Path) -> None:
    model, path = convert(
        """ g (int64[b] positions, float[b] x) => (float[b] y) <float frequency = {0.7}>
        {
            counted = Cast<to = 1>(positions)
            angle = Mul(counted, frequency)
            turned = Cos(angle)
            y = Mul(x, turned)
        }""",
        tmp_path,
    )
    assert readable(model)[-2:] == ["turned_to_float16 = Cast(turned)", "y = Mul(x, turned_to_float16)"]
    positions = np.array([0, 5001, 8191])  # float16 counts to 2048
    (found,) = OnnxModel(path)({"positions": positions, "x": np.ones(3, np.float32)})
    np.testing.assert_allclose(found, np.cos(0.7 * positions), atol=2e-3)  # 0.7 * 8191 is 2e-4 off in float32 too


def test_a_weight_that_both_read_is_there_twice_and_finite(tmp_path: Path) -> None:
    model, _ = convert(
        """ g (float[b, 2] x) => (float[b, 2] y, float[b, 2] z) <float[2] w = {1e9, -1e9}>
        {
            y = Add(x, w)
            z = Pow(x, w)
        }""",
        tmp_path,
    )
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_array_equal(arrays["w"], np.float16([65504, -65504]))
    np.testing.assert_array_equal(arrays["w_float32"], np.float32([1e9, -1e9]))
    assert readable(model)[-2:] == ["z_before_cast = Pow(x_to_float, w_float32)", "z = Cast(z_before_cast)"] or (
        "z = Cast(z_before_cast)" in readable(model)
    )


def test_a_loop_is_refused(tmp_path: Path) -> None:
    text = """ g (float[2] x, bool c) => (float[2] y)
    {
        y = If (c) <
            then_branch = a () => (float[2] p) { p = Neg(x) }, else_branch = b () => (float[2] q) { q = Abs(x) }
        >
    }"""
    with pytest.raises(UsageError, match="has a If, which stays float32"):
        convert(text, tmp_path)


def test_bfloat16_of_a_model(
    tiny_captured: Callable[[str], Any], tiny_batch: Callable[..., Any], tmp_path: Path
) -> None:
    """ONNX Runtime computes none of it on a CPU: ONNX's own reference does."""
    model, captured = tiny_captured("llama")
    source = emit_onnx(model, captured, captured.graph, tmp_path)
    (tmp_path / "half").mkdir()
    path = convert_dtype(source, tmp_path / "half", "bfloat16")
    onnx.checker.check_model(str(path), full_check=True)
    found = onnx.load(path)
    assert {v.type.tensor_type.elem_type for v in found.graph.output} == {TensorProto.FLOAT}
    assert sum(t.data_type == TensorProto.BFLOAT16 for t in found.graph.initializer) > 10
    inputs = {name: value.numpy() for name, value in tiny_batch(2, 9).items()}
    run = OnnxModel(source)
    expected = run(run.at_start(inputs))
    outputs = ReferenceEvaluator(found).run(None, run.at_start(inputs))
    for actual, wanted in zip(outputs, expected, strict=True):
        # A last bit is 2**-8; some of them add up.
        assert np.abs(np.asarray(actual, np.float32) - wanted).max() < 3e-2 * np.abs(wanted).max()
