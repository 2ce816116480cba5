"""ONNX Runtime in a child process, on a real model with external data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper

from dotresize_fx.errors import BadWeightsError, MissingExtraError, ModelNotFoundError, OnnxRuntimeError, UnknownOpError
from dotresize_fx.export.onnx_runtime import Comparison, compare_outputs
from dotresize_fx.export.onnx_session import OnnxModel, physical_cores
from dotresize_fx.export.runtime_process import largest_difference
from dotresize_fx.export.timing import measure_latency

pytest.importorskip("onnxruntime")

WEIGHT = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
# Sums of 8 products of numbers around 1, rounded to 24 bits in another order: 8 * 4 * 2**-24 is 2e-6.
TOLERANCE = 1e-5


def save_matmul(folder: Path, repeat: int = 0) -> Path:
    """x (batch, length, 8) @ WEIGHT, in external data; ``repeat``: a loop of that many x @ I before it."""
    folder.mkdir(parents=True, exist_ok=True)
    nodes, start, weights = [], "x", [onnx.numpy_helper.from_array(WEIGHT, "w")]
    if repeat:
        weights.append(onnx.numpy_helper.from_array(np.eye(8, dtype=np.float32), "identity"))
        weights.append(onnx.numpy_helper.from_array(np.array(repeat, dtype=np.int64), "times"))
        weights.append(onnx.numpy_helper.from_array(np.array(True), "true"))
        body = helper.make_graph(
            [
                helper.make_node("MatMul", ["before", "identity"], ["after"]),
                helper.make_node("Identity", ["going"], ["on"]),
            ],
            "body",
            [
                helper.make_tensor_value_info("step", TensorProto.INT64, []),
                helper.make_tensor_value_info("going", TensorProto.BOOL, []),
                helper.make_tensor_value_info("before", TensorProto.FLOAT, None),
            ],
            [
                helper.make_tensor_value_info("on", TensorProto.BOOL, []),
                helper.make_tensor_value_info("after", TensorProto.FLOAT, None),
            ],
        )
        nodes.append(helper.make_node("Loop", ["times", "true", "x"], ["looped"], body=body))
        start = "looped"
    nodes.append(helper.make_node("MatMul", [start, "w"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", 5])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=100)
    assert (folder / "model.onnx.data").stat().st_size >= WEIGHT.nbytes
    return path


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return save_matmul(tmp_path / "model")


def batch_of(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(batch * length).standard_normal((batch, length, 8)).astype(np.float32)


def test_masked_positions_are_not_compared(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[b, l, 8] x, int64[b, l] mask) => (float[b, l, 8] y) '
    onnx.save(onnx.parser.parse_model(text + "{ y = Identity(x) }"), tmp_path / "identity.onnx")
    x = batch_of(2, 3)
    mask = np.array([[1, 1, 1], [0, 1, 1]])
    wrong = x.copy()
    wrong[1, 0] += 1
    cases = [({"x": x, "mask": mask}, [wrong])]
    assert compare_outputs(tmp_path / "identity.onnx", cases, tmp_path).max_abs_difference == pytest.approx(1, rel=1e-6)
    assert compare_outputs(tmp_path / "identity.onnx", cases, tmp_path, mask="mask").max_abs_difference == 0


def test_comparison_of_equal_and_of_shifted_outputs(model_path: Path, tmp_path: Path) -> None:
    first, second = batch_of(1, 3), batch_of(2, 4)
    shifted = second @ WEIGHT
    shifted[1, 2, 3] += 0.5
    cases = ((inputs, outputs) for inputs, outputs in [({"x": first}, [first @ WEIGHT]), ({"x": second}, [shifted])])
    result = compare_outputs(model_path, cases, tmp_path)
    assert isinstance(result, Comparison)
    assert result.cases[0].max_abs_difference < TOLERANCE
    assert result.cases[0].max_abs_expected == pytest.approx(float(np.abs(first @ WEIGHT).max()))
    assert result.cases[1].max_abs_difference == pytest.approx(0.5, abs=TOLERANCE)
    assert result.cases[1].shapes == result.cases[1].expected_shapes == ((2, 4, 5),)
    assert result.max_abs_difference == result.cases[1].max_abs_difference
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "the work folder is left as it was"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_no_number_is_an_infinite_difference(model_path: Path, tmp_path: Path, value: float) -> None:
    inputs = batch_of(1, 2)
    expected = inputs @ WEIGHT
    expected[0, 1, 0] = value
    assert compare_outputs(model_path, [({"x": inputs}, [expected])], tmp_path).max_abs_difference == np.inf
    inputs[0, 0, 0] = value  # now in the model's output, against finite expectations
    finite = np.zeros((1, 2, 5), np.float32)
    assert compare_outputs(model_path, [({"x": inputs}, [finite])], tmp_path).max_abs_difference == np.inf


def test_another_shape_is_an_infinite_difference(model_path: Path, tmp_path: Path) -> None:
    inputs = batch_of(1, 2)
    result = compare_outputs(model_path, [({"x": inputs}, [(inputs @ WEIGHT)[0]])], tmp_path)
    assert result.max_abs_difference == np.inf
    assert (result.cases[0].shapes, result.cases[0].expected_shapes) == (((1, 2, 5),), ((2, 5),))


def test_largest_difference_crosses_its_chunks() -> None:
    left = np.zeros(3_000_000, np.float32)
    right = left.copy()
    right[2_500_000] = -7
    assert largest_difference(left, right) == (7.0, 7.0)
    assert largest_difference(right, right) == (0.0, 7.0)
    masked = np.array([-np.inf, 1.0])
    assert largest_difference(masked, masked) == (0.0, 1.0)
    assert largest_difference(left[:0], right[:0]) == (0.0, 0.0)


def test_nothing_to_compare_is_refused(model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_outputs(model_path, [], tmp_path)


def test_latency_is_interleaved_and_states_its_conditions(model_path: Path) -> None:
    latencies = measure_latency({"dense": model_path, "slim": model_path}, {"x": batch_of(2, 7)}, runs=9, threads=1)
    assert list(latencies) == ["dense", "slim"]
    for item in latencies.values():
        assert 0 < item.min <= item.p25 <= item.median <= item.p75 <= item.max
        assert (item.runs, item.batch, item.length, item.threads) == (9, 2, 7, 1)
        assert item.provider == "CPUExecutionProvider"
        assert item.peak_rss_bytes is None or item.peak_rss_bytes > 1_000_000


def test_latency_sees_the_slower_model_and_keeps_to_its_budget(model_path: Path, tmp_path: Path) -> None:
    slow = save_matmul(tmp_path / "slow", repeat=20_000)
    models = {"slow": slow, "fast": model_path}
    latencies = measure_latency(models, {"x": batch_of(1, 1)}, runs=100_000, threads=1, budget=0.01)
    assert latencies["slow"].runs == latencies["fast"].runs == 5
    assert latencies["slow"].median > 10 * latencies["fast"].median


BIG_PARENT = """
import sys, numpy as np
from pathlib import Path
from dotresize_fx.export.onnx_runtime import compare_outputs
held = np.ones(600_000_000 // 8)
x = np.zeros((1, 1, 8), np.float32)
cases = [({"x": x}, [np.zeros((1, 1, 5), np.float32)])]
result = compare_outputs(Path(sys.argv[1]), cases, Path(sys.argv[2]))
assert held[0] == 1 and result.max_abs_difference == 0
print(result.peak_rss_bytes)
"""


def test_peak_memory_is_the_childs_own(model_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BIG_PARENT, str(model_path), str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if found == "None":
        pytest.skip("this system does not tell a process's peak memory")
    # A Python with numpy and ONNX Runtime takes 60 to 150 MB; the parent's 600 MB must not be in it.
    assert 10_000_000 < int(found) < 400_000_000


def test_child_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, dotresize_fx.export.runtime_process; print({'torch', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_a_source_folder_in_the_working_folder_shadows_nothing(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dotresize_fx").mkdir()
    (tmp_path / "dotresize_fx" / "__init__.py").write_text("raise RuntimeError('shadowed')")
    monkeypatch.chdir(tmp_path)
    inputs = batch_of(1, 2)
    relative = model_path.relative_to(tmp_path)
    result = compare_outputs(relative, [({"x": inputs}, [inputs @ WEIGHT])], Path("."))
    assert result.max_abs_difference < TOLERANCE


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        ("garbage", BadWeightsError),
        ("no data", BadWeightsError),
        ("cut data", BadWeightsError),
        ("gone", ModelNotFoundError),
    ],
)
def test_damaged_files_are_one_clear_line(model_path: Path, tmp_path: Path, damage: str, kind: type[Exception]) -> None:
    data = model_path.with_name("model.onnx.data")
    if damage == "garbage":
        model_path.write_bytes(b"this is no model" * 10)
    elif damage == "no data":
        data.unlink()
    elif damage == "cut data":
        data.write_bytes(data.read_bytes()[:20])
    else:
        model_path.unlink()
    with pytest.raises(kind, match=r"model\.onnx") as here:
        OnnxModel(model_path)
    with pytest.raises(kind, match=r"model\.onnx") as in_child:
        compare_outputs(model_path, [({"x": batch_of(1, 1)}, [batch_of(1, 1)])], tmp_path)
    assert "\n" not in str(here.value)
    assert "\n" not in str(in_child.value)


@pytest.mark.parametrize(("domain", "opset", "version"), [("", 99, 10), ("my.own", 20, 10), ("", 20, 99)])
def test_what_this_runtime_does_not_know_is_no_damage(tmp_path: Path, domain: str, opset: int, version: int) -> None:
    one = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    two = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["x"], ["y"], domain=domain)
    sets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("my.own", 1)]
    graph = onnx.helper.make_graph([node], "unknown", [one], [two])
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx.helper.make_model(graph, opset_imports=sets, ir_version=version).SerializeToString())
    with pytest.raises(UnknownOpError, match=r"does not know all that .*; take a newer one") as caught:
        OnnxModel(path)
    assert "\n" not in str(caught.value)


def test_missing_runtime_names_the_extra(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # how Python itself marks a module as not importable
    for call in (
        lambda: OnnxModel(model_path),
        lambda: compare_outputs(model_path, [], tmp_path),
        lambda: measure_latency({"a": model_path}, {}),
    ):
        with pytest.raises(MissingExtraError, match=r"pip install 'dotresize-fx\[cpu\]'"):
            call()


def test_missing_provider_names_the_extra(model_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has it")
    with pytest.raises(MissingExtraError, match=r"dotresize-fx\[gpu\]"):
        measure_latency({"a": model_path}, {"x": batch_of(1, 1)}, provider="CUDAExecutionProvider")


def test_wrong_inputs_are_named(model_path: Path, tmp_path: Path) -> None:
    model = OnnxModel(model_path)
    with pytest.raises(OnnxRuntimeError, match=r"missing inputs \['x'\]"):
        model({})
    with pytest.raises(OnnxRuntimeError, match=r"unknown inputs \['z'\]"):
        model({"x": batch_of(1, 1), "z": batch_of(1, 1)})
    with pytest.raises(OnnxRuntimeError, match="cannot run"):
        model({"x": np.zeros((1, 1, 9), np.float32)})
    with pytest.raises(OnnxRuntimeError, match="has 1 outputs, 2 were expected"):
        compare_outputs(model_path, [({"x": batch_of(1, 1)}, [batch_of(1, 1), batch_of(1, 1)])], tmp_path)


def test_model_in_this_process(model_path: Path) -> None:
    model = OnnxModel(model_path, threads=1)
    assert (model.input_names, model.output_names) == (("x",), ("y",))
    inputs = batch_of(3, 2)
    (output,) = model({"x": inputs})
    np.testing.assert_allclose(output, inputs @ WEIGHT, atol=TOLERANCE)


def test_physical_cores_is_no_more_than_the_cpus_allowed() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


def children_of(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        # The command line is asked too: between fork and exec a child still is a copy of this process.
        if int(fields[1]) == pid and fields[0] != "Z" and b"runtime_process" in command:
            found.append(int(folder.name))
    return found


def await_child(parent: int, seconds: float = 30) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := children_of(parent):
            return found[0]
        time.sleep(0.02)
    raise AssertionError("no child process was started")


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc")


@linux
def test_killed_child_is_one_clear_error(tmp_path: Path) -> None:
    slow = save_matmul(tmp_path / "slow", repeat=2_000_000_000)

    def kill() -> None:
        os.kill(await_child(os.getpid()), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(OnnxRuntimeError, match=r"ended by SIGKILL \(out of memory\?\)") as caught:
        measure_latency({"slow": slow}, {"x": batch_of(1, 1)})
    assert "\n" not in str(caught.value)


@linux
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_child_ends_with_its_parent(tmp_path: Path, by: signal.Signals) -> None:
    slow = save_matmul(tmp_path / "slow", repeat=2_000_000_000)
    code = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from dotresize_fx.export.timing import measure_latency\n"
        "measure_latency({'slow': Path(sys.argv[1])}, {'x': np.zeros((1, 1, 8), np.float32)})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(slow)], stderr=subprocess.DEVNULL)
    child = await_child(parent.pid)
    time.sleep(0.5)  # let it get into the endless run
    os.kill(parent.pid, by)
    assert parent.wait(timeout=30) != 0
    end = time.monotonic() + 30
    while time.monotonic() < end and Path(f"/proc/{child}").exists():
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()
