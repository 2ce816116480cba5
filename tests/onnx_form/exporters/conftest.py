"""Tiny models as each exporter writes them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from torch import nn

from dotresize_fx.cli import main
from dotresize_fx.export.capture import capture
from dotresize_fx.export.capture_cache import capture_with_cache
from dotresize_fx.export.convert_dtype import convert_dtype
from dotresize_fx.export.emit_genai import emit_genai
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.passes.prove_exactness import redraw_parameters


class _Ids(nn.Module):
    """The first output alone, for exporters that take no dictionaries."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return output


class _Pixels(_Ids):
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        output: torch.Tensor = self.model(pixel_values=pixel_values)[0]
        return output


def _tiny(kind: str, make: Callable[..., Any], layers: int) -> Any:
    """A tiny model of any of the kinds below, its parameters re-drawn."""
    plain = {"vocab_size": 97, "max_position_embeddings": 64}
    if kind == "vit":
        sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 64}
        config: Any = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=7)
        model: Any = transformers.ViTForImageClassification(config)
    elif kind == "t5":
        sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": layers, "num_heads": 4}
        model = transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu"))
    elif kind in ("albert", "bart"):
        sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 64}
        parts = {
            f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", layers), ("ffn_dim", 64))
        }
        parts |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32}
        model = (
            transformers.AlbertModel(transformers.AlbertConfig(**plain, **sizes, embedding_size=16))
            if kind == "albert"
            else transformers.BartModel(transformers.BartConfig(**plain, **parts, use_cache=False))
        )
    elif kind == "distilbert":
        config = transformers.DistilBertConfig(**plain, dim=32, hidden_dim=64, n_layers=layers, n_heads=4)
        model = transformers.DistilBertModel(config)
    elif kind == "roberta":
        sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 64}
        model = transformers.RobertaModel(transformers.RobertaConfig(**plain, **sizes))
    else:
        return make(kind, layers=layers)
    return redraw_parameters(model.eval())


def _by_torch(model: Any, kind: str, path: Path, dynamo: bool) -> None:
    ids, mask = torch.randint(0, 97, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    image = kind == "vit"
    arguments: Any = (torch.randn(2, 3, 16, 16),) if image else (ids, mask)
    names = ["pixel_values"] if image else ["input_ids", "attention_mask"]
    free = {0: "batch"} if image else {0: "batch", 1: "length"}
    module = (_Pixels if image else _Ids)(model)
    if dynamo:
        shapes = tuple(dict.fromkeys(free, torch.export.Dim.DYNAMIC) for _ in arguments)
        program: Any = torch.onnx.export(
            module, arguments, dynamo=True, input_names=names, dynamic_shapes=shapes, verbose=False
        )
        program.save(str(path))
        return
    free_axes = dict.fromkeys([*names, "out"], free)
    options: Any = {"input_names": names, "output_names": ["out"], "dynamic_axes": free_axes, "opset_version": 17}
    torch.onnx.export(module, arguments, str(path), dynamo=False, **options)


def _by_us(model: Any, kind: str, path: Path, target: str) -> None:
    captured = capture_with_cache(model) if kind != "bert" else capture(model)
    emit_onnx(model, captured, captured.graph.copy(), path.parent, target)


def _by_transformers(model: Any, kind: str, path: Path, fused: bool) -> None:
    exporter = pytest.importorskip("transformers.exporters.exporter_onnx")
    ids, mask = torch.randint(0, 97, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    inputs = (
        {"pixel_values": torch.randn(2, 3, 16, 16)} if kind == "vit" else {"input_ids": ids, "attention_mask": mask}
    )
    config = exporter.OnnxConfig(dynamic=True, **({"ort_fusions": "cpu"} if fused else {}))
    exporter.OnnxExporter.save_program(exporter.OnnxExporter().export(model, inputs, config).program, path)


def _by_genai(save_tokenizer: Callable[[Path], Any], path: Path, layers: int) -> None:
    """ONNX Runtime GenAI's builder on a Llama whose heads are of 16 numbers: its attention takes no smaller ones."""
    pytest.importorskip("onnxruntime_genai")
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    checkpoint = path.parent / "checkpoint"
    redraw_parameters(model.eval()).save_pretrained(checkpoint)
    save_tokenizer(checkpoint)
    emit_genai(checkpoint, path.parent, path.parent)


def _optimised(source: Path, kind: str, path: Path, half: bool) -> None:
    pytest.importorskip("onnxruntime")
    from onnxruntime.transformers import optimizer

    name = "bert" if "bert" in kind else "gpt2"
    model = optimizer.optimize_model(str(source), model_type=name, num_heads=4, hidden_size=32, opt_level=0)
    if half:
        model.convert_float_to_float16(keep_io_types=True)
    model.save_model_to_file(str(path))


@pytest.fixture(scope="session")
def exported(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], tiny_tokenizer: Callable[[Path], Any]
) -> Callable[..., Path]:
    """``exported(kind, way, layers=1)``: a tiny model as an ONNX file.

    ``way`` is ``script`` (TorchScript), ``dynamo``, ``any`` or ``cpu`` (our own exporter with a cache, by target),
    ``ort`` and ``ort-half`` (onnxruntime's optimiser on what TorchScript gave), ``half`` (``cpu`` in float16), ``hf``
    and ``hf-fused`` (transformers' OnnxExporter, plain and with its fusions) or ``genai``, which is skipped where that
    is not installed.
    """

    @cache
    def make(kind: str, way: str, layers: int = 1) -> Path:
        path = tmp_path_factory.mktemp(f"{kind}-{way}") / "model.onnx"
        if way.startswith("ort"):
            _optimised(make(kind, "script", layers), kind, path, half=way == "ort-half")
        elif way == "genai":
            _by_genai(tiny_tokenizer, path, layers)
        elif way == "half":
            convert_dtype(make(kind, "cpu", layers), path.parent, "float16")
        else:
            model = _tiny(kind, tiny_model, layers)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if way.startswith("hf"):
                    _by_transformers(model, kind, path, fused=way == "hf-fused")
                elif way in ("any", "cpu"):
                    _by_us(model, kind, path, way)
                else:
                    _by_torch(model, kind, path, dynamo=way == "dynamo")
        return path

    return make


def _random_inputs(path: Path, rows: int, length: int) -> dict[str, np.ndarray[Any, Any]]:
    generator, made = np.random.default_rng(0), {}
    for value in onnx.load(path, load_external_data=False).graph.input:
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if value.name == "attention_mask":
            made[value.name] = np.ones((rows, length), dtype)
            made[value.name][::5, :3] = 0
        elif value.name == "input_ids":
            made[value.name] = generator.integers(0, 97, (rows, length)).astype(dtype)
        elif value.name == "pixel_values":
            made[value.name] = generator.standard_normal((rows, *sizes[1:])).astype(dtype)
    return made


@pytest.fixture(scope="session")
def random_inputs() -> Callable[..., dict[str, np.ndarray[Any, Any]]]:
    """``random_inputs(path, rows, length)``: for what has to be given, pixels, or ids and a mask padded on the left."""
    return _random_inputs


@pytest.fixture
def slim(exported: Any, tmp_path: Path) -> Callable[..., tuple[Path, Path, dict[str, Any]]]:
    """``slim(kind, way, *options, code=0, layers=1, rows=40)``: (dense file, OUT, report) of an export calibrated on
    random inputs.
    """

    def run(
        kind: str, way: str, *options: str, code: int = 0, layers: int = 1, rows: int = 40
    ) -> tuple[Path, Path, dict[str, Any]]:
        path, out = exported(kind, way, layers), tmp_path / "out"
        np.savez(tmp_path / "inputs.npz", **_random_inputs(path, rows, 12))
        data = ("--calibration-data", str(tmp_path / "inputs.npz"))
        with pytest.raises(SystemExit) as ended:
            main(["export", str(path), str(out), "--quiet", *data, *options])
        assert ended.value.code == code
        return path, out, {} if code else json.loads((out / "report.json").read_text())

    return run
