"""Rotary pairs of an ONNX graph: what solvers hear of how alike they turn, and so how queries and keys are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.onnx_source import load_onnx
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.gram import padding_mask
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.onnx_form.region_sums import OnnxRegion
from dotresize_fx.onnx_form.rotary_tables import RotaryTables
from dotresize_fx.onnx_form.sensitivity import measure_onnx_curves
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.region_inputs import RegionInputs
from dotresize_fx.regions import RegionKind
from dotresize_fx.sensitivity import measure_curves

KINDS = (RegionKind.QUERY_KEY, RegionKind.VALUE)


@pytest.fixture(scope="module")
def forms(tiny_captured: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A Llama's canonical program and graph."""
    model, captured = tiny_captured("llama")
    path = emit_onnx(model, captured, captured.graph, tmp_path_factory.mktemp("llama"))
    program, graph = captured.graph.copy(), OnnxGraph(load_onnx(Path(path)))
    for form in (program, graph):
        canonicalise(form)
    return program, graph


def test_pairs_turn_as_in_the_program(forms: tuple[Any, Any], tiny_batch: Callable[..., Any]) -> None:
    """Padded on the left: positions count from the first real token."""
    program, graph = forms
    batch = dict(tiny_batch(3, 24, padding=4))
    (one, *_), (other, *_) = (find_regions(form).of_kind(RegionKind.QUERY_KEY) for form in forms)
    watched, execution = RegionInputs(program, one), Execution(program)
    values = execution.run(execution.start(batch), 0, len(execution.nodes), keep=set(watched.turning))
    expected = watched.coherence(values, padding_mask(batch))
    tables = RotaryTables(batch, padding_mask(batch), causal=True)
    found = tables.coherence(OnnxRegion(graph, other), OnnxExecution(graph))
    assert expected is not None
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # angles of float32
    alike = RotaryTables(batch, padding_mask(batch), causal=False).coherence(
        OnnxRegion(graph, other), OnnxExecution(graph)
    )
    assert alike is not None


def test_curves_of_heads_are_those_of_the_program(forms: tuple[Any, Any], tiny_batch: Callable[..., Any]) -> None:
    program, graph = forms
    batches = [dict(tiny_batch(4, 24, seed=seed)) for seed in range(8)]
    kinds = [zip(*(find_regions(form).of_kind(kind) for form in forms), strict=True) for kind in KINDS]
    pairs = [pair for layer in zip(*kinds, strict=True) for pair in layer]  # in graph order
    expected = measure_curves(program, [one for one, _ in pairs], batches)
    found = measure_onnx_curves(
        graph, [other for _, other in pairs], batches, task="decoder", rows=lambda batch: batch["input_ids"].numel()
    )
    for one, other in pairs:
        finite = expected[one.name].isfinite()
        torch.testing.assert_close(found[other.name][finite], expected[one.name][finite], rtol=2e-2, atol=1e-9)
