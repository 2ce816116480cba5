"""Weights in files while a model is traced and a program is converted: zeros stand in, and nothing of them stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch

import dotresize_fx.export.weights_apart
from dotresize_fx.export.capture import capture
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.model_source import load_model
from dotresize_fx.export.stand_ins import stand_ins
from dotresize_fx.export.weights_apart import WeightsApart
from dotresize_fx.offload.lazy_tensor import LazyTensor

SaveModel = Callable[..., Path]


def test_a_lazy_model_computes_and_is_captured_as_a_loaded_one_is(tmp_path: Path, save_tiny_model: SaveModel) -> None:
    folder = str(save_tiny_model(tmp_path, tie_word_embeddings=True))
    normal, lazy = load_model(folder).model, load_model(folder, reads=False).model
    parameters = dict(lazy.named_parameters())
    assert all(isinstance(parameter, LazyTensor) for parameter in parameters.values())
    assert lazy.get_output_embeddings().weight is lazy.get_input_embeddings().weight
    ids = torch.arange(12)[None]
    assert torch.equal(lazy(input_ids=ids)[0], normal(input_ids=ids)[0])
    state = capture(lazy).graph.program.state_dict
    assert state.keys() == capture(normal).graph.program.state_dict.keys()
    for name, parameter in parameters.items():
        assert state[name] is parameter
    with stand_ins(lazy):
        assert not any(isinstance(parameter, LazyTensor) for parameter in lazy.parameters())
        assert lazy.get_output_embeddings().weight is lazy.get_input_embeddings().weight
    assert dict(lazy.named_parameters()) == parameters


def test_a_converted_program_reads_its_weights_when_it_is_written(
    tmp_path: Path, save_tiny_model: SaveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transposed by the converter or not, the file holds what that of a loaded model does."""
    monkeypatch.setattr(dotresize_fx.export.weights_apart, "LEAST_APART", 1 << 12)
    folder = str(save_tiny_model(tmp_path / "model"))
    written = []
    for reads in (True, False):
        model = load_model(folder, reads=reads).model
        captured = capture(model)
        (out := tmp_path / f"reads {reads}").mkdir()
        path = emit_onnx(model, captured, captured.graph, out)
        written.append([file.read_bytes() for file in (path, path.with_name(f"{path.name}.data"))])
    assert written[0] == written[1]


def program_of(weight: torch.Tensor) -> Any:
    class Program:
        state_dict = {"weight": LazyTensor(lambda: weight, tuple(weight.shape), weight.dtype)}  # noqa: RUF012
        constants: dict[str, Any] = {}  # noqa: RUF012

    return Program()


def model_with(array: Any) -> onnx_ir.Model:
    graph = onnx_ir.Graph([], [], nodes=[], initializers=[])
    value = onnx_ir.Value(name="w", const_value=onnx_ir.Tensor(array, name="w"))
    graph.initializers["w"] = value
    return onnx_ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.T, lambda w: w[3:, 2:], lambda w: w[None, ::2]])
def test_views_of_the_zeros_become_views_of_the_weight(view: Callable[[Any], Any]) -> None:
    weight = torch.randn(160, 200)
    apart = WeightsApart(program := program_of(weight))
    model = model_with(view(program.state_dict["weight"].detach().numpy()))
    assert apart.put_back(model)
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), view(weight.numpy()))  # type: ignore[union-attr]


@pytest.mark.parametrize("computed", [lambda w: w * 2, lambda w: w.T.copy(), lambda w: w[:2].sum(1)])
def test_what_was_computed_from_zeros_is_noticed(computed: Callable[[Any], Any]) -> None:
    apart = WeightsApart(program := program_of(torch.randn(160, 200)))
    assert not apart.put_back(model_with(computed(program.state_dict["weight"].detach().numpy())))
