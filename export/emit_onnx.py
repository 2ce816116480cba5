"""Emit: a captured (and slimmed) program becomes model.onnx with its weights in one external file.

transformers' ONNX exporter converts; it is given our program where it would have traced the model.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.exporters.exporter_onnx import OnnxExporter

from dotresize_fx.cache_names import PAST, POSITIONS
from dotresize_fx.export.capture import Captured, no_fast_path
from dotresize_fx.export.flatten_heads import flatten_heads
from dotresize_fx.export.fuse_attention import OPSET, fuse_attention
from dotresize_fx.export.fuse_skip_norms import fuse_skip_norms
from dotresize_fx.export.nodewise_program import NodewiseProgram
from dotresize_fx.export.onnx_file import ONNX_FILE, WEIGHTS_FILE
from dotresize_fx.export.quiet import quiet_libraries
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.fx_form.simplify import simplify

# By the target, whose ops of ONNX Runtime transformers' exporter fuses into.
FUSIONS = {"any": None, "cpu": "cpu", "cuda": "cuda"}
# Of a graph with a cache, by the input.
FREE_SIZES = {
    "input_ids": {0: "batch_size", 1: "sequence_length"},
    "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
    POSITIONS: {0: "batch_size", 1: "sequence_length"},
    PAST: {0: "batch_size", 2: "past_sequence_length"},
}


def emit_onnx(model: torch.nn.Module, captured: Captured, graph: FxGraph, folder: Path, target: str = "any") -> Path:
    """Convert ``graph``, a rewriting of ``captured.graph``, and write it into ``folder``; returns model.onnx's path.

    ``model`` only tells the exporter the names of inputs and outputs (it is run once on the tiny sample).
    """
    graph = graph.restore_pointwise()
    graph.refresh_shapes()
    simplify(graph)
    fused = target != "any"
    cached = captured.cache
    sample = dict(captured.sample if cached is None else cached.sample)
    with quiet_libraries(), no_fast_path(), torch.no_grad(), cached.on(model) if cached else nullcontext():
        # Inside: it warns of versions when it is made.
        exporter = _GivenProgramExporter(NodewiseProgram.of(graph.program), captured)
        config = OnnxConfig(dynamic=True, ort_fusions=FUSIONS[target], opset_version=OPSET if fused else None)
        exported = exporter.export(model, sample, config)
    if fused:
        fuse_attention(exported.program)
        flatten_heads(exported.program)
        fuse_skip_norms(exported.program)
        RemoveUnusedNodesPass()(exported.program)
    if cached is not None:
        _name_sizes(exported.program.graph)
    path = folder / ONNX_FILE
    try:
        onnx_ir.save(exported.program, str(path), external_data=WEIGHTS_FILE)
    except OSError as error:
        if error.errno is not None:
            raise
        # numpy writes the arrays, and says of a full disk no more than that some elements did not go.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
    return path


def _name_sizes(graph: onnx_ir.Graph) -> None:
    """Free sizes by what they are, as Optimum calls them, in place of the tracer's numbers."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        wanted = FREE_SIZES[value.name.partition(".")[0]]
        for axis, name in wanted.items():
            names.setdefault(str(value.shape[axis]), name)
    for value in (*graph.inputs, *graph.outputs):
        value.shape = onnx_ir.Shape([names.get(str(size), size) for size in value.shape])


class _GivenProgram(DynamoExporter):  # type: ignore[misc]
    """Hands a program over in place of tracing one."""

    program: torch.export.ExportedProgram
    metadata: Any

    def export_program(self, model: torch.nn.Module, sample_inputs: Mapping[str, Any], config: Any) -> Any:
        model(**sample_inputs)  # the exporter records the names of inputs and outputs while this runs
        return self.program, self.metadata


class _GivenProgramExporter(OnnxExporter, _GivenProgram):  # type: ignore[misc]
    def __init__(self, program: torch.export.ExportedProgram, captured: Captured) -> None:
        super().__init__()
        self.program, self.metadata = program, captured.metadata
