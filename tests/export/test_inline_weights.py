"""Weights inside an ONNX file: moved beside it and back, and left out of what is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dotresize_fx.export.inline_weights import MOVED, move_in, move_out, without_weights

LARGE, SMALL = np.arange(MOVED, dtype=np.float32), np.arange(3, dtype=np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Weights of all sizes, an empty one among them, and fields in front of them and behind."""
    arrays = {"first": LARGE, "small": SMALL, "none": SMALL[:0], "last": LARGE[::-1].copy()}
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    tensors[0].doc_string = "told behind the data"
    tensors.append(helper.make_tensor("numbers", TensorProto.FLOAT, [3], SMALL))  # not as bytes
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [MOVED]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "first"], ["y"])], "g", [x], [y], tensors, "documented")
    model = helper.make_model(graph, producer_name="somebody", opset_imports=[helper.make_opsetid("", 18)])
    helper.set_model_props(model, {"kept": "yes"})
    onnx.save(model, tmp_path / "whole.onnx")
    return tmp_path / "whole.onnx"


def weights(model: onnx.ModelProto) -> dict[str, list[float]]:
    return {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in model.graph.initializer}


def folder(tmp_path: Path) -> Path:
    (made := tmp_path / "moved").mkdir()
    return made


def test_they_come_back_byte_for_byte(path: Path, tmp_path: Path) -> None:
    moved = move_out(path, folder(tmp_path))
    assert weights(onnx.load(moved)) == weights(onnx.load(path))
    small = onnx.load(moved, load_external_data=False)
    beside = [tensor.name for tensor in small.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    assert beside == ["first", "last"]
    move_in(moved, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()


def test_what_is_read_without_them_says_where_they_are(path: Path) -> None:
    model = without_weights(path)
    assert model.ByteSize() < LARGE.nbytes
    assert [tensor.name for tensor in model.graph.initializer] == ["first", "small", "none", "last", "numbers"]
    onnx.load_external_data_for_model(model, str(path.parent))
    assert weights(model) == weights(onnx.load(path))


def test_a_model_without_initializers(path: Path, tmp_path: Path) -> None:
    model = onnx.load(path)
    del model.graph.initializer[:]
    onnx.save(model, path)
    move_in(move_out(path, folder(tmp_path)), tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("left", [0.3, 0.99])
def test_a_file_that_is_cut_off(path: Path, tmp_path: Path, left: float) -> None:
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    with pytest.raises(ValueError, match="ends behind"):
        move_out(path, folder(tmp_path))


def test_weights_beside_the_file_already(path: Path, tmp_path: Path) -> None:
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=MOVED)
    with pytest.raises(ValueError, match="beside"):
        move_out(path, folder(tmp_path))
