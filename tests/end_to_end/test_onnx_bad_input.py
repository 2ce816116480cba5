"""ONNX files with nothing to cut, or that are none, and data that they do not read: one line and an exit code each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("onnxruntime")

X = np.random.default_rng(0).standard_normal((40, 5, 8)).astype(np.float32)
UP = 'u0 = MatMul(x, "up.weight")  u = Add(u0, "up.bias")'
DOWN = 'd0 = MatMul(h, "down.weight")  d = Add(d0, "down.bias")'
PLAIN = f"{UP}  h = Relu(u)  {DOWN}  y = Add(d, x)"
TEST = "s = ReduceSum <keepdims = 0> (x)  c = Greater(s, zero)"
INSIDE = f"{TEST}  y = If(c) <then_branch = a () => (t) {{ {UP}  h = Relu(u)  {DOWN}  t = Add(d, x) }}, "
INSIDE += "else_branch = b () => (t) { t = Identity(x) }>"
BEHIND = f"{UP}  h = Relu(u)  {DOWN}  v = Add(d, x)  y = If(yes) <then_branch = a () => (t) {{ t = Neg(v) }}, "
BEHIND += "else_branch = b () => (t) { t = Identity(v) }>"
LOOP = "y = Loop(three, yes, x) <body = b (int64 i, bool c, float[batch, length, 8] x0) => "
LOOP += '(bool c2, float[batch, length, 8] t) { c2 = Identity(c)  u = MatMul(x0, "up.weight")  h = Relu(u) '
LOOP += 't0 = MatMul(h, "down.weight")  t = Add(t0, x0) }>'
CUSTOM = f'{UP}  h = other.thing(u)  v = Relu(u)  d = MatMul(v, "down.weight")  e = Add(d, x)  y = Add(e, e)'


def weights(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(seed)
    sizes = {"up.weight": (8, 64), "up.bias": (64,), "down.weight": (64, 8), "down.bias": (8,)}
    return {name: generator.standard_normal(size).astype(np.float32) for name, size in sizes.items()}


def made(body: str, functions: str = "", **others: np.ndarray[Any, Any]) -> onnx.ModelProto:
    text = '<ir_version: 10, opset_import: ["" : 20, "local" : 1, "other" : 1]>\n'
    text += "m (float[batch, length, 8] x) => (float[batch, length, 8] y) "
    text += "<float zero = {0.0}, int64 three = {3}, int64[1] last = {-1}, bool yes = {1}> "
    text += f"{{ {body} }}\n{functions}"
    model = onnx.parser.parse_model(text)
    read = {name for node in all_nodes(model.graph) for name in node.input}
    for name, array in {**weights(), **others}.items():
        if name in read:
            model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [*graph.node, *(node for body in inner for node in all_nodes(body))]


@pytest.fixture
def export(here: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """``export(model, arrays={"x": X}, *options)``: how the command ended; OUT is tmp_path/out."""

    def run(model: onnx.ModelProto | Path, arrays: Mapping[str, Any] | None = None, *options: object) -> Any:
        path = model if isinstance(model, Path) else tmp_path / "model.onnx"
        if not isinstance(model, Path):
            path.write_bytes(model.SerializeToString())
        np.savez(tmp_path / "x.npz", **({"x": X} if arrays is None else arrays))
        data = ("--calibration-data", tmp_path / "x.npz", "--quiet")
        return here("export", path, tmp_path / "out", *data, *options)

    return run


def refused(ended: Any, code: int, said: str) -> None:
    assert (ended.code, said in ended.stderr) == (code, True), ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (INSIDE, 6, "inside an If or a Loop"),
        (LOOP, 6, "inside an If or a Loop"),
        ("y = Relu(x)", 6, "no linear with a weight"),
        (CUSTOM, 15, "other:thing"),
        (PLAIN.replace("y = Add", "v = Add") + "  y = Sqrt(v)", 7, "puts out NaN"),
    ],
)
def test_graphs_that_are_not_cut(export: Callable[..., Any], tmp_path: Path, body: str, code: int, said: str) -> None:
    refused(export(made(body)), code, said)
    assert not (tmp_path / "out").exists()


def test_a_sublayer_beside_control_flow_is_cut(export: Callable[..., Any], tmp_path: Path) -> None:
    assert export(made(BEHIND)).code == 0
    branches = []
    for name in ("model.onnx", "out/model.onnx"):
        nodes = all_nodes(onnx.load(tmp_path / name).graph)
        branches.append([(n.op_type, n.input, n.output) for n in nodes if n.op_type in ("If", "Neg", "Identity")])
    assert branches[0] == branches[1]
    assert len(branches[0]) == 3


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"z": X}, "lacks x"),
        ({"x": X, "z": X}, "holds z"),
        ({"x": X[..., :7]}, "has shape (40, 5, 7)"),
        ({"x": X[0]}, "has shape (5, 8)"),
        ({"x": X.astype(np.int64)}, "is int64"),
        ({"x": np.array(["a", "b"])}, "no array of numbers"),
        ({"x": X[:1]}, "at least 2 are needed"),
        ({"x": X[:0]}, "is empty"),
        ({"x": X * np.nan}, "holds NaN"),
    ],
)
def test_arrays_that_are_none_of_its_inputs(export: Callable[..., Any], arrays: dict[str, Any], said: str) -> None:
    refused(export(made(PLAIN), arrays), 7, said)


def test_inputs_that_cannot_be_known(export: Callable[..., Any]) -> None:
    model = made(PLAIN)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    refused(export(model), 6, "input x has no shape")
    model = made(PLAIN)
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    refused(export(model), 6, "its weights are inputs of the graph")


def test_files_that_are_no_models(export: Callable[..., Any], tmp_path: Path) -> None:
    for name, content in (("text", b"no model at all\n" * 30), ("nothing", b"")):
        (tmp_path / f"{name}.onnx").write_bytes(content)
        refused(export(tmp_path / f"{name}.onnx"), 3, "is no ONNX model")


def test_weights_in_another_file(export: Callable[..., Any], tmp_path: Path) -> None:
    (folder := tmp_path / "beside").mkdir()
    path = folder / "model.onnx"
    onnx.save(made(PLAIN), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    proto = onnx.load(path, load_external_data=False)
    for tensor in filter(lambda tensor: tensor.external_data, proto.graph.initializer):
        tensor.external_data[0].value = str(folder / "w.bin")
    (folder / "whole.onnx").write_bytes(proto.SerializeToString())
    refused(export(folder / "whole.onnx"), 3, "a whole path, which is not read")
    (folder / "w.bin").unlink()
    refused(export(path), 4, "wants w.bin beside it, which is missing")


def test_the_folder_of_the_model_is_no_place_for_the_slim_one(
    here: Callable[..., Any], tree: Callable[[Path], dict[str, str]], export: Callable[..., Any], tmp_path: Path
) -> None:
    assert export(made(PLAIN)).code == 0
    out = tmp_path / "out"
    for path, options in ((tmp_path / "model.onnx", ()), (tmp_path / "model.onnx", ("--force",)), (out, ("--force",))):
        folder = path.parent if path.is_file() else path
        before = tree(tmp_path)
        ended = here("export", path, folder, "--calibration-data", tmp_path / "x.npz", "--quiet", *options)
        assert ended.code == 8, (path, options, ended.stderr)
        assert ended.stderr.count("\n") == 1
        assert tree(tmp_path) == before


def quantised(model: onnx.ModelProto, path: Path, how: str) -> Path:
    """``model`` as ONNX Runtime's quantisers write it."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        batches = iter([{"x": X}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    source = path.with_name("dense.onnx")
    onnx.save(model, source)
    if how == "dynamic":
        quantize_dynamic(source, path)
    elif how == "qdq":
        quantize_static(source, path, Reader(), quant_format=QuantFormat.QDQ)
    else:
        quantiser = MatMulNBitsQuantizer(model, block_size=16, nodes_to_exclude=["kept_up", "kept_down"])
        quantiser.process()
        quantiser.model.save_model_to_file(str(path))
    return path


@pytest.mark.parametrize("how", ["dynamic", "qdq", "nbits"])
def test_quantised_weights_are_left_alone(export: Callable[..., Any], tmp_path: Path, how: str) -> None:
    path = quantised(made(PLAIN), tmp_path / "quantised.onnx", how)
    refused(export(path), 6, "2 of 2 linears are quantised")


def test_what_is_not_quantised_is_cut(export: Callable[..., Any], tmp_path: Path) -> None:
    body = PLAIN.replace("y = Add", "z = Add") + '  p = MatMul(z, "kept.up")  q = Relu(p)  r = MatMul(q, "kept.down")'
    others = {"kept.up": weights(1)["up.weight"], "kept.down": weights(1)["down.weight"]}
    model = made(f"{body}  y = Add(r, z)", **others)
    for node in model.graph.node:
        if node.op_type == "MatMul":
            node.name = node.input[1].replace(".", "_")
    path = quantised(model, tmp_path / "mixed.onnx", "nbits")
    assert export(path).code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "2 linears with quantised weights were left alone" in report["notes"]
    stored = {t.name: t for t in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer}
    dense = {t.name: t for t in onnx.load(path).graph.initializer}
    assert stored["kept.up"].dims[1] < 64
    changed = {name for name in dense if dense[name] != stored[name]}
    assert changed == {"kept.up", "kept.down"}


ACT = '<domain: "local", opset_import: ["" : 20]>\nact (a) => (b) { b = Relu(a) }\n'
SHIFT = '<domain: "local", opset_import: ["" : 20]>\nshift (a) => (b) { b = Neg(a) }\n'


def test_only_functions_that_a_width_crosses_are_inlined(export: Callable[..., Any], tmp_path: Path) -> None:
    body = f"{UP}  h = local.act(u)  {DOWN}  e = Add(d, x)  y = local.shift(e)"
    assert export(made(body, ACT + SHIFT)).code == 0
    assert [f.name for f in onnx.load(tmp_path / "out" / "model.onnx").functions] == ["shift"]
    assert export(made(body, ACT + SHIFT), None, "--ratio", "0", "--force").code == 0
    assert {f.name for f in onnx.load(tmp_path / "out" / "model.onnx").functions} == {"act", "shift"}


def test_a_bias_that_is_shared_is_forked(export: Callable[..., Any], tmp_path: Path) -> None:
    body = PLAIN.replace("y = Add", "v = Add") + '  w = MatMul(x, "other")  z = Add(w, "up.bias")'
    body += "  f = ReduceSum <keepdims = 1> (z, last)  y = Mul(v, f)"
    assert export(made(body, other=weights(2)["up.weight"])).code == 0
    stored = {t.name: tuple(t.dims) for t in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer}
    assert stored["up.bias"] == (64,)
    assert stored["up.weight"][1] == next(size for name, (*_, size) in stored.items() if name.startswith("up.bias_"))


def test_weights_of_bfloat16_need_a_device_that_has_them(export: Callable[..., Any]) -> None:
    body = PLAIN.replace("(x,", "(b,").replace("y = Add(d, x)", "e = Add(d, b)  y = Cast <to = 1> (e)")
    model = made(f"b = Cast <to = 16> (x)  {body}")
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.ndim:
            tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.BFLOAT16, array.shape, array.reshape(-1)))
    said = "in bfloat16, which a CPU hardly computes: take --device cuda, or convert it to float16"
    refused(export(model, None, "--device", "cpu"), 15, said)


def test_an_opset_too_old_for_what_is_put_in(export: Callable[..., Any]) -> None:
    model = made(PLAIN)
    model.opset_import[0].version = 11
    refused(export(model), 2, "opset 11 is too old, 13 is the least")


def test_constants_of_types_that_numpy_lacks_are_left(export: Callable[..., Any]) -> None:
    """They are computed by no one here, and break nothing."""
    half = "o = Constant <value = float[1] {1.0}> ()  n = Cast <to = 16> (o)  m = Cast <to = 1> (n)"
    body = f"{half}  {PLAIN.replace('y = Add', 'e = Add')}  y = Mul(e, m)"
    assert export(made(body)).code == 0


def test_a_writer_that_shares_its_bias_with_one_of_another_width(export: Callable[..., Any], tmp_path: Path) -> None:
    """Zeros that an optimiser made one constant of: what stands in for one while probing must not for the other."""
    body = PLAIN.replace("y = Add", "v = Add") + '  w = MatMul(v, "other")  z = Add(w, "up.bias")  r = Relu(z)'
    body += '  p = MatMul(r, "back")  y = Add(p, v)'
    others = {"other": weights(2)["up.weight"], "back": weights(2)["down.weight"]}
    assert export(made(body, **others)).code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sum(row["width_after"] < row["width_before"] for row in report["regions"]) >= 1


def test_bfloat16_outside_a_model_that_computes_in_float32(export: Callable[..., Any], tmp_path: Path) -> None:
    """Its inputs are given as float32; what it puts out is compared, measured and timed."""
    model = made(PLAIN.replace("y = Add", "x2 = Add"))
    model.graph.node.insert(0, helper.make_node("Cast", ["outside"], ["x"], to=TensorProto.FLOAT))
    model.graph.node.append(helper.make_node("Cast", ["x2"], ["y"], to=TensorProto.BFLOAT16))
    model.graph.input[0].name = "outside"
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    ended = export(model, {"outside": X}, "--device", "cpu")
    assert ended.code == 0, ended.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["summary"]["verified"]
    assert report["figures"]["fidelity"][0]["relative_error"] > 0
    slim = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert [value.type.tensor_type.elem_type for value in (*slim.input, *slim.output)] == [TensorProto.BFLOAT16] * 2
