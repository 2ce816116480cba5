"""Files of every exporter through ``export``: slimmed, verified, and run in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from dotresize_fx.export import prove_onnx
from dotresize_fx.export.onnx_session import OnnxModel
from dotresize_fx.onnx_form.start import is_cache

pytest.importorskip("onnxruntime")

ALL = [
    ("bert", "dynamo"),
    ("llama", "dynamo"),
    ("roberta", "script"),
    ("distilbert", "script"),
    ("qwen3", "script"),
    ("vit", "script"),
    ("t5", "script"),
    ("gpt2", "hf"),
    ("bert", "hf-fused"),
    ("llama", "hf-fused"),
    ("gpt2", "any"),
    ("llama", "cpu"),
    ("bert", "ort"),
    ("gpt2", "ort"),
    ("bert", "ort-half"),
    ("llama", "half"),
    ("llama", "genai"),
]
# One kind of width alone: packed in one weight, in fused ops, with a cache, in reshapes.
PARTS = [
    ("gpt2", "script", "value"),
    ("gpt2", "any", "query_key"),
    ("llama", "cpu", "query_key"),
    ("llama", "cpu", "value"),
    ("llama", "cpu", "kv_heads"),
    ("gpt2", "any", "kv_heads"),
    ("llama", "script", "query_key"),
    ("llama", "hf-fused", "query_key"),
    ("llama", "hf-fused", "kv_heads"),
    ("bert", "ort", "query_key"),
    ("bert", "ort", "value"),
    ("bert", "ort", "kv_heads"),
    ("bert", "hf-fused", "kv_heads"),
    ("llama", "genai", "kv_heads"),
]


def numbers(path: Path) -> int:
    """How many numbers its floating-point weights are."""
    stored = onnx.load(path, load_external_data=False).graph.initializer
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return sum(int(np.prod(tensor.dims)) for tensor in stored if tensor.data_type in kinds)


def cut_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["regions"] if row["width_after"] < row["width_before"]}


@pytest.mark.parametrize(("kind", "way"), ALL)
def test_what_an_exporter_wrote_is_slimmed(
    slim: Callable[..., Any], random_inputs: Callable[..., Any], kind: str, way: str
) -> None:
    path, out, report = slim(kind, way, "--ratio", "0.3")
    assert report["summary"]["verified"]
    assert cut_of(report)
    assert report["summary"]["block_weights_removed"] == pytest.approx(0.3, abs=0.06)  # widths come in steps
    assert report["figures"]["verification"]["against"] == prove_onnx.TWIN
    assert numbers(out / "model.onnx") < numbers(path)
    model = OnnxModel(out / "model.onnx")
    (answer, *_) = model(model.at_start(random_inputs(path, 3, 9))) if way != "genai" else [np.zeros(1)]
    assert np.isfinite(answer).all()


@pytest.mark.parametrize(("kind", "way", "region"), PARTS)
def test_one_kind_of_width_alone(slim: Callable[..., Any], kind: str, way: str, region: str) -> None:
    """It is cut in this form, the cache declares what is left, and the file is what was solved for."""
    path, out, report = slim(kind, way, "--regions", region, "--ratio", "0.1")
    (row,) = cut_of(report).values()
    assert row["kind"] == region
    assert report["figures"]["verification"]["against"] == prove_onnx.TWIN
    assert numbers(out / "model.onnx") < numbers(path)
    before, after = (declared(file) for file in (path, out / "model.onnx"))
    axis = 1 if region == "kv_heads" else 3
    touched = {"query_key": ("key",), "value": ("value",), "kv_heads": ("key", "value")}[region]
    for name in filter(is_cache, before):
        expected = list(before[name])
        if name.rpartition(".")[2] in touched:
            expected[axis] = row["width_after"]
        assert after[name] == expected


def test_pairs_turned_by_other_angles_are_found_out(
    slim: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dense file with zeros has to have what is left of queries and keys where the tables turn them alike."""
    places = prove_onnx._places

    def others(entry: Any, pairs: torch.Tensor | None) -> torch.Tensor:
        return places(entry, None if pairs is None else (pairs + 1) % (entry.region.width // 2))

    monkeypatch.setattr(prove_onnx, "_places", others)
    slim("llama", "script", "--regions", "query_key", "--ratio", "0.1", code=10)
    assert "the slim ONNX differs from the dense file with zeros" in capsys.readouterr().err


def declared(path: Path) -> dict[str, list[int | str]]:
    """The sizes that inputs and outputs are said to have."""
    graph = onnx.load(path, load_external_data=False).graph
    return {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
