"""ONNX files slimmed on a GPU, in every precision: calibrated, proved, measured and timed where they are to run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import transformers
from onnx import TensorProto

from dotresize_fx.export.capture_cache import capture_with_cache
from dotresize_fx.export.convert_dtype import convert_dtype
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.onnx_session import CUDA, OnnxModel
from dotresize_fx.passes.prove_exactness import redraw_parameters

pytest.importorskip("onnxruntime")

SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
LENGTH = 12
# Of the largest logit: another order of sums in float32, from calibration on.
AGREE = 1e-3
# Rounded weights and activations choose other neurons: as many times as far from the dense model.
FURTHER = 3


def outside_in_bfloat16(source: Path, path: Path) -> Path:
    """A file whose inputs and outputs are float32, with a cast beside each, as one of which they are bfloat16."""
    model = onnx.load(source)
    makers = {name: node for node in model.graph.node for name in node.output}
    for value in model.graph.input:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    for value in model.graph.output:
        assert makers[value.name].op_type == "Cast"
        makers[value.name].attribute[0].i = TensorProto.BFLOAT16
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama's file in each precision, ``outside``: with inputs and outputs in bfloat16 too, and ``data``."""
    folder = tmp_path_factory.mktemp("precisions")
    model = redraw_parameters(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval())
    captured = capture_with_cache(model)
    for name in ("float32", "float16", "bfloat16", "outside"):
        (folder / name).mkdir()
    made = {"float32": emit_onnx(model, captured, captured.graph.copy(), folder / "float32")}
    for name in ("float16", "bfloat16"):
        made[name] = convert_dtype(made["float32"], folder / name, name)
    made["outside"] = outside_in_bfloat16(made["bfloat16"], folder / "outside" / "model.onnx")
    ids, mask = np.random.default_rng(0).integers(0, 300, (64, LENGTH)), np.ones((64, LENGTH), np.int64)
    mask[::5, :3] = 0
    np.savez(folder / "inputs.npz", input_ids=ids, attention_mask=mask)
    return {**made, "data": folder / "inputs.npz"}


@pytest.fixture
def slim(here: Callable[..., Any], files: dict[str, Path], tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """``slim(precision, device, *options)``: (OUT, its report)."""

    def export(precision: str, device: str, *options: str) -> tuple[Path, Any]:
        out = tmp_path / f"{precision} {device}"
        data = ("--calibration-data", files["data"], "--device", device, "--quiet")
        ended = here("export", files[precision], out, *data, *options)
        assert ended.code == 0, ended.stderr
        return out, json.loads((out / "report.json").read_text())

    return export


def logits(out: Path, files: dict[str, Path], **options: Any) -> np.ndarray[Any, Any]:
    model = OnnxModel(out / "model.onnx", **options)
    inputs = {name: array[:4] for name, array in np.load(files["data"]).items()}
    return model(model.at_start(inputs))[0].astype(np.float32)


def kinds(path: Path) -> dict[str, int]:
    graph = onnx.load(path, load_external_data=False).graph
    outside = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    return outside | {tensor.name: tensor.data_type for tensor in graph.initializer}


def numbers(path: Path) -> set[str]:
    """Initialisers without dimensions."""
    return {tensor.name for tensor in onnx.load(path, load_external_data=False).graph.initializer if not tensor.dims}


def test_a_file_in_bfloat16_is_a_model(files: dict[str, Path]) -> None:
    """What the GPU is given here; without one nothing of it can be run."""
    for name in ("bfloat16", "outside"):
        onnx.checker.check_model(str(files[name]), full_check=True)
    given = {name: kind for name, kind in kinds(files["outside"]).items() if name.startswith(("past", "present"))}
    assert len(given) == 4 * SIZES["num_hidden_layers"]
    assert set(given.values()) == {TensorProto.BFLOAT16}


@pytest.mark.gpu
def test_float32_is_what_it_is_on_a_cpu(slim: Callable[..., Any], files: dict[str, Path]) -> None:
    out, report = slim("float32", "cuda", "--ratio", "0.25")
    other, expected = slim("float32", "cpu", "--ratio", "0.25")
    assert report["summary"]["verified"]
    assert report["figures"]["slim"]["latency"]["provider"] == CUDA
    assert (
        json.loads((out / "plan.json").read_text())["widths"] == json.loads((other / "plan.json").read_text())["widths"]
    )
    found, wanted = logits(out, files, provider=CUDA, tf32=False), logits(other, files)
    real = np.load(files["data"])["attention_mask"][:4].astype(bool)
    assert np.abs(found - wanted)[real].max() <= AGREE * np.abs(wanted[real]).max()
    kl = [each["figures"]["fidelity"][0]["kl_to_dense"] for each in (report, expected)]
    assert kl[0] == pytest.approx(kl[1], rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "outside"])
def test_half_precision_is_cut_as_it_is(slim: Callable[..., Any], files: dict[str, Path], precision: str) -> None:
    ffns = ("--ratio", "0.25", "--regions", "ffn")
    _, expected = slim("float32", "cpu", *ffns)
    out, report = slim(precision, "cuda", *ffns)
    assert report["summary"]["verified"]
    assert report["figures"]["slim"]["latency"]["provider"] == CUDA
    removed = [each["summary"]["block_weights_removed"] for each in (report, expected)]
    assert removed[0] == pytest.approx(removed[1], abs=0.03)  # widths come in steps
    kl = [each["figures"]["fidelity"][0]["kl_to_dense"] for each in (report, expected)]
    assert 0 < kl[0] <= FURTHER * kl[1]
    found, given = (
        {name: kind for name, kind in kinds(path).items() if kind != TensorProto.INT64}  # sizes may be stated
        for path in (out / "model.onnx", files[precision])
    )
    assert found.items() <= given.items()
    assert set(given) - set(found) <= numbers(files[precision])  # of norms that are one op now
    assert np.isfinite(logits(out, files, provider=CUDA)).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [("--method", "rank", "--ratio", "0.2"), ("--merge", "1", "--merge-method", "aligned")]
)
def test_ranks_and_depth(slim: Callable[..., Any], options: tuple[str, ...]) -> None:
    _, report = slim("float32", "cuda", *options)
    assert report["summary"]["verified"]
    assert report["summary"]["block_weights_removed"] > 0.1
