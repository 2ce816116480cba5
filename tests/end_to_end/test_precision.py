"""model.onnx in half precision and with quantised weights: written, compared, measured and read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest

import dotresize_fx
from dotresize_fx.errors import MissingExtraError, VerificationError
from dotresize_fx.export import precision
from dotresize_fx.export.onnx_session import CUDA, OnnxModel
from dotresize_fx.slim_result import SlimResult

HALF = onnx.TensorProto.FLOAT16


@pytest.fixture(scope="module")
def slimmed() -> dict[str, SlimResult]:
    return {}


@pytest.fixture
def saved(
    slimmed: dict[str, SlimResult], model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """``saved(kind, **options)``: (OUT, its report.json) of a model that is slimmed once."""

    def save(kind: str, **options: Any) -> tuple[Path, dict[str, Any]]:
        if kind not in slimmed:
            sizes = {"calibration_tokens": 2048, "sequence_length": 32, "evaluation_tokens": 512}
            slimmed[kind] = dotresize_fx.slim(str(model_folder(kind)), 0.25, calibration=[text_file], **sizes)
        result = slimmed[kind]
        replace(result, options=replace(result.options, **options)).save(tmp_path / "out")
        return tmp_path / "out", json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))

    return save


def precisions(report: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    dense, slim = report["figures"]["precisions"]
    assert (dense["side"], slim["side"]) in (("dense", "slim"), ("slim", "dense"))
    return (dense, slim) if dense["side"] == "dense" else (slim, dense)


def test_float16_is_half_as_large_and_computes_the_same(
    saved: Callable[..., Any], text_file: Path, here: Callable[..., Any], exported: Callable[[str], Any]
) -> None:
    out, report = saved("llama", dtype="float16")
    dense, slim = precisions(report)
    assert report["options"]["dtype"] == slim["precision"] == dense["precision"] == "float16"
    check = slim["verification"]
    assert check["max_abs_difference"] <= check["tolerance"] == 5e-3
    assert check["cases"] > 4  # those behind a part of the text too
    # Random logits tie more often than a language model's; 99 % of a trained one's 4 k positions is asked for.
    assert slim["top1_agreement"] > 0.97
    assert abs(slim["fidelity"]["excess"] - report["figures"]["fidelity"][0]["excess"]) < 1e-3
    file_bytes = sum((out / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert slim["file_bytes"] == file_bytes < report["figures"]["slim"]["file_bytes"]
    model = onnx.load(out / "model.onnx")
    floats = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    assert {name: kind for name, kind in floats.items() if kind == HALF}.keys() == {
        "logits",
        *(f"{side}.0.{part}" for side in ("past_key_values", "present") for part in ("key", "value")),
    }
    # What reads the folder feeds it what it takes.
    perplexity = here("eval", out, "--text", text_file, "--sequence-length", 32, "--tokens", 512)
    assert perplexity.code == 0, perplexity.stderr
    text = here("generate", out, "the of and", "--max-tokens", 12, "--quiet")
    assert text.code == 0, text.stderr
    timed = here("bench", exported("llama")[0], out, "--workload", "prompt=8,decode=2", "--runs", 2, "--quiet")
    assert timed.code == 0, timed.stderr


def test_what_rounding_does_in_pytorch_is_allowed(saved: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(precision.TOLERANCES, "float16", 1e-6)  # which no float16 reaches
    _, report = saved("llama", dtype="float16")
    check = precisions(report)[1]["verification"]
    assert 1e-6 < check["max_abs_difference"] <= check["tolerance"] < 2e-2
    assert "PyTorch's products in float16 move its outputs by" in " ".join(report["notes"])


def test_what_rounds_too_coarsely_is_written_with_an_exact_stream(
    saved: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(precision.TOLERANCES, "float16", 1e-6)
    monkeypatch.setattr(precision, "half_noise", lambda *_: (0.0,))
    with pytest.raises(VerificationError, match=r"in float16 differs .* of an output's largest number") as refused:
        saved("llama", dtype="float16", target="cpu")
    assert refused.value.exit_code == 10
    streams = []

    def departs(self: precision.Precision, cases: precision.Cases) -> tuple[float, int]:
        streams.append(self._exact_stream)
        return (0.0 if self._exact_stream else 1.0), 1

    monkeypatch.setattr(precision.Precision, "_departure", departs)
    out, report = saved("llama", dtype="float16", target="cpu")
    assert streams == [False, True]
    assert "its residual stream stays float32" in " ".join(report["notes"])
    model = onnx.load(out / "model.onnx", load_external_data=False)
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    norms = [node for node in model.graph.node if node.op_type == "SkipSimplifiedLayerNormalization"]
    assert norms
    assert all(kinds[node.input[0]] == onnx.TensorProto.FLOAT for node in norms)


def test_float16_of_an_encoder(saved: Callable[..., Any]) -> None:
    out, report = saved("bert", dtype="float16")
    dense, slim = precisions(report)
    assert dense["fidelity"]["mean_cosine"] > 0.9999
    assert slim["fidelity"]["mean_cosine"] == pytest.approx(report["figures"]["fidelity"][0]["mean_cosine"], abs=1e-3)
    assert slim["top1_agreement"] is None
    assert {output.type for output in OnnxModel(out / "model.onnx").session.get_outputs()} == {"tensor(float16)"}


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_weights(saved: Callable[..., Any], here: Callable[..., Any], kind: str) -> None:
    out, report = saved("llama", quantize=kind)
    dense, slim = precisions(report)
    assert report["options"]["quantize"] == kind
    assert slim["verification"] is None
    assert slim["quantised_linears"] == slim["linears"] == dense["linears"] == 8  # with the head
    assert slim["file_bytes"] < report["figures"]["slim"]["file_bytes"]
    # 8 bits of a block's range move a weight by 1/510 of it at most, 4 bits by 1/30.
    least = {"int8": 0.9, "int4": 0.6}[kind]
    assert slim["top1_agreement"] > least
    assert dense["top1_agreement"] == dense["fidelity"]["top1_agreement"] > least
    assert abs(dense["fidelity"]["excess"]) < {"int8": 0.01, "int4": 0.2}[kind]
    ops = {node.op_type for node in onnx.load(out / "model.onnx", load_external_data=False).graph.node}
    assert "MatMulNBits" in ops
    assert ("GatherBlockQuantized" in ops) == (kind == "int4")
    table = here("generate", out, "the of and", "--max-tokens", 4, "--quiet")
    assert table.code == 0, table.stderr


def test_what_cannot_be_is_said_in_one_line(
    here: Callable[..., Any], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    def said(*options: str) -> str:
        ended = here("export", model_folder("llama"), tmp_path / "out", *options)
        assert (ended.code, ended.stdout, ended.stderr.count("\n")) == (code, "", 1)
        return str(ended.stderr)

    code = 2
    assert "--dtype float8: choose one of bfloat16, float16, float32" in said("--dtype", "float8")
    assert "leave out --dtype float16" in said("--quantize", "int8", "--dtype", "float16")
    if CUDA not in onnxruntime.get_available_providers():
        code = MissingExtraError.exit_code
        assert "bfloat16 needs ONNX Runtime for CUDA" in said("--dtype", "bfloat16")
