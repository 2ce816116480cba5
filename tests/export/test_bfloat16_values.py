"""bfloat16, which numpy lacks, on its way into ONNX Runtime and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from dotresize_fx.export.bfloat16_values import to_array, to_bfloat16
from dotresize_fx.export.onnx_runtime import compare_outputs
from dotresize_fx.export.onnx_session import OnnxModel
from dotresize_fx.export.timing import measure_latency

pytest.importorskip("onnxruntime")

# Ops that ONNX Runtime has for bfloat16 on a CPU.
TURNED = """<ir_version: 10, opset_import: ["" : 20]>
turned (bfloat16[rows, width] x) => (bfloat16[width, rows] y, float[rows, width] z) {
    y = Transpose(x)
    z = Cast <to = 1> (x)
}"""


def floats() -> np.ndarray:
    """Halfway cases in both directions, the smallest and largest numbers, and ordinary ones."""
    some = np.random.default_rng(0).standard_normal(400).astype(np.float32)
    halfway = ((np.arange(200, dtype=np.uint32) + 0x3F80) << 16 | 0x8000).view(np.float32)
    edges = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38, 3.38e38, 1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    return np.concatenate([some, halfway, edges])


def test_floats_are_rounded_as_torch_rounds_them() -> None:
    values = floats()
    np.testing.assert_array_equal(to_array(to_bfloat16(values)), torch.from_numpy(values).bfloat16().float().numpy())
    negative_nan = np.array([0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(to_array(to_bfloat16(negative_nan))).all()


@pytest.mark.parametrize("shape", [(), (2, 0, 3), (4, 5)])
def test_shapes_stay(shape: tuple[int, ...]) -> None:
    assert to_array(to_bfloat16(np.ones(shape, np.float64))).shape == shape


def test_a_file_that_reads_and_puts_it_out(tmp_path: Path) -> None:
    path = tmp_path / "turned.onnx"
    path.write_bytes(onnx.parser.parse_model(TURNED).SerializeToString())
    x = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    rounded = torch.from_numpy(x).bfloat16().float().numpy()
    y, z = OnnxModel(path)({"x": x})
    np.testing.assert_array_equal(y, rounded.T)
    np.testing.assert_array_equal(z, rounded)
    assert compare_outputs(path, [({"x": x}, [rounded.T, rounded])], tmp_path).max_abs_difference == 0
    assert compare_outputs(path, [({"x": x}, [rounded.T + 1, rounded])], tmp_path).max_abs_difference == 1
    assert measure_latency({"turned": path}, {"x": x}, runs=2, work=tmp_path)["turned"].runs == 2
