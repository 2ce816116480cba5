"""ONNX files that exist alone: what is inspected of them, and those that are refused, each in a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper

from dotresize_fx import cli
from dotresize_fx.errors import BadWeightsError, DotresizeError, ModelNotFoundError
from dotresize_fx.export.onnx_source import analyse_onnx, is_onnx_source, load_onnx
from dotresize_fx.progress import Progress

FFN = """<ir_version: 10, opset_import: ["" : 20]>
ffn (float[batch, 8] x) => (float[batch, 8] y) {
    h0 = MatMul(x, "up.weight")
    h = Relu(h0)
    y = MatMul(h, "down.weight")
}"""
CNN = """<ir_version: 10, opset_import: ["" : 20]>
cnn (float[batch, 3, 16, 16] x) => (float[batch, 4, 14, 14] y) {
    c = Conv(x, "kernel")
    y = Relu(c)
}"""
BRANCHED = """<ir_version: 10, opset_import: ["" : 20]>
branched (float[batch, 8] x, bool choose) => (float[batch, 8] y) {
    h = MatMul(x, "up.weight")
    z = If (choose) <
        then_branch = then () => (float[batch, 12] p) { p = Relu(h) },
        else_branch = otherwise () => (float[batch, 12] q) { q = Neg(h) }
    >
    y = MatMul(z, "down.weight")
}"""
SHAPES = {"up.weight": (8, 12), "down.weight": (12, 8), "kernel": (4, 3, 3, 3)}


def saved(folder: Path, text: str = FFN, **options: object) -> Path:
    """The model with random weights, as model.onnx in a new folder."""
    proto, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    for name in SHAPES:
        if f'"{name}"' in text:
            weight = rng.standard_normal(SHAPES[name]).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(weight, name))
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, folder / "model.onnx", **options)
    return folder / "model.onnx"


def external(folder: Path) -> Path:
    return saved(folder, save_as_external_data=True, location="weights.bin", size_threshold=0)


def refused(path: Path, kind: type[DotresizeError]) -> str:
    with pytest.raises(kind) as raised:
        load_onnx(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_file_and_its_folder_are_told_from_a_hugging_face_folder(tmp_path: Path) -> None:
    path = saved(tmp_path / "plain")
    assert is_onnx_source(path)
    assert is_onnx_source(path.parent)
    (path.parent / "config.json").write_text("{}")
    assert not is_onnx_source(path.parent)
    assert not is_onnx_source("smollm2-135m")


def test_external_data_stays_on_disk_and_is_matched(tmp_path: Path) -> None:
    path = external(tmp_path)
    graph, matches = analyse_onnx(path, Progress(quiet=True), check=True)
    assert [(str(region.kind), region.width) for region in matches.regions] == [("ffn", 12)]
    assert all(row.matched for row in matches.linears)
    assert all(
        isinstance(value.const_value, onnx_ir.ExternalTensor) for value in graph.model.graph.initializers.values()
    )


def test_external_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    path = external(tmp_path / "model")
    (path.parent / "weights.bin").rename(tmp_path / "weights.bin")
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = "../weights.bin"
    path.write_bytes(proto.SerializeToString())
    assert "outside its folder" in refused(path, ModelNotFoundError)


def test_external_data_behind_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = external(tmp_path / "model")
    (path.parent / "weights.bin").rename(tmp_path / "weights.bin")
    (path.parent / "weights.bin").symlink_to(tmp_path / "weights.bin")
    assert "outside its folder" in refused(path, ModelNotFoundError)


def test_external_data_that_is_missing_or_cut_off_is_named(tmp_path: Path) -> None:
    path = external(tmp_path)
    data = path.parent / "weights.bin"
    data.write_bytes(data.read_bytes()[:-4])
    assert "weights.bin is cut off" in refused(path, BadWeightsError)
    data.unlink()
    assert "weights.bin beside it, which is missing" in refused(path, BadWeightsError)


def test_a_file_that_is_cut_off_or_no_model_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    assert "cut off" in refused(path, ModelNotFoundError)
    path.write_bytes(b"no model")
    assert "no ONNX model" in refused(path, ModelNotFoundError)
    assert "no such file" in refused(tmp_path / "absent.onnx", ModelNotFoundError)


@pytest.mark.parametrize(("text", "reasons"), [(CNN, {"Conv with a weight is not understood as a linear"}), (BRANCHED, {
    "it goes into If, which is not understood", "it comes from If, which is not understood",
    "it comes from an input of the graph", "it is an output of the graph",
})])  # fmt: skip
def test_a_graph_with_nothing_to_match_says_why(tmp_path: Path, text: str, reasons: set[str]) -> None:
    _, matches = analyse_onnx(saved(tmp_path, text), Progress(quiet=True), check=True)
    assert not matches.regions
    assert {reason for row in matches.linears for reason in (row.reads_reason, row.writes_reason)} == reasons


def test_quantised_weights_are_listed_with_the_reason(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
    quantised (float[batch, 32] x) => (float[batch, 32] y) {
        h0 = com.microsoft.MatMulNBits <K = 32, N = 64, bits = 4, block_size = 32> (x, "four.weight", "scales")
        h = Relu(h0)
        d = DequantizeLinear("eight.weight", "scale")
        y = MatMul(h, d)
    }"""
    proto, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    packed = rng.integers(0, 255, (64, 1, 16)).astype(np.uint8)
    for name, array in (
        ("four.weight", packed),
        ("scales", np.ones(64, np.float32)),
        ("eight.weight", np.ones((64, 32), np.int8)),
        ("scale", np.float32(0.1)),
    ):
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    onnx.save(proto, tmp_path / "model.onnx")
    _, matches = analyse_onnx(tmp_path, Progress(quiet=True), check=True)
    assert not matches.regions
    listed = {row.parameter: (row.shape, row.writes_reason) for row in matches.linears}
    why = "its weight is quantised ({}), which is not cut: give the model before quantisation"
    assert listed == {
        "four.weight": ((64, 32), why.format("MatMulNBits")),
        "eight.weight": ((32, 64), why.format("DequantizeLinear")),
    }


def test_inspect_prints_the_report_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", str(saved(tmp_path)), "--quiet"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("1 region: width, who shares it, changes of basis that it allows\n")
    assert "2 linears, 2 matched" in printed


def test_inspect_of_a_broken_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08")
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", str(tmp_path / "model.onnx"), "--quiet"])
    assert ended.value.code == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_nodes_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    path = saved(tmp_path / "model")
    proto = onnx.load(path)
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    onnx.save(proto, path)
    assert [node.op_type for node in load_onnx(path).graph] == ["MatMul", "Relu", "MatMul"]
    _, matches = analyse_onnx(path, Progress(quiet=True))
    assert [region.width for region in matches.regions] == [12]
