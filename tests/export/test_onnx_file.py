"""An ONNX file that is none, or whose data is not whole, is found out before it is run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from dotresize_fx.errors import BadWeightsError, ModelNotFoundError
from dotresize_fx.export.onnx_file import find_onnx, onnx_size, read_onnx
from dotresize_fx.export.weight_files import file_sha256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As export writes one: model.onnx, its data, and a report with sums."""
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[b, 64] x) => (float[b, 64] y) { y = MatMul(x, w) }'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(64, dtype=np.float32), "w"))
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    sums = {name: file_sha256(tmp_path / name) for name in ("model.onnx", "model.onnx.data")}
    (tmp_path / "report.json").write_text(json.dumps({"outputs_sha256": sums}))
    return tmp_path


def test_a_whole_one(folder: Path) -> None:
    assert find_onnx(folder) == find_onnx(folder / "model.onnx") == folder / "model.onnx"
    assert len(read_onnx(folder / "model.onnx").graph.node) == 1
    assert onnx_size(folder / "model.onnx") == sum(
        (folder / n).stat().st_size for n in ("model.onnx", "model.onnx.data")
    )


@pytest.mark.parametrize("content", [b"", b"this is no model" * 10, b"\x08\x0a"])
def test_no_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelNotFoundError, match="not an ONNX model"):
        read_onnx(find_onnx(tmp_path))
    with pytest.raises(ModelNotFoundError, match="no ONNX model"):
        find_onnx(tmp_path / "elsewhere.onnx")


@pytest.mark.parametrize("damage", ["gone", "cut off", "other bytes"])
def test_damaged_data(folder: Path, damage: str) -> None:
    data = folder / "model.onnx.data"
    if damage == "gone":
        data.unlink()
    elif damage == "cut off":
        data.write_bytes(data.read_bytes()[:-1])
    else:
        data.write_bytes(b"\x00" * data.stat().st_size)
    said = {"gone": "missing", "cut off": "cut off: 16383 bytes of 16384", "other bytes": "not what report.json"}
    with pytest.raises(BadWeightsError, match=said[damage]):
        read_onnx(folder / "model.onnx")
