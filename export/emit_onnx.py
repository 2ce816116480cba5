"""Emit: a captured (and slimmed) program becomes model.onnx with its weights in one external file.

transformers' ONNX exporter converts; it is given our program where it would have traced the model.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import onnx_ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from dotresize_fx.cache_names import PAST, POSITIONS
from dotresize_fx.export.capture import Captured
from dotresize_fx.export.fit_rotary_tables import fit_rotary_tables
from dotresize_fx.export.flatten_heads import flatten_heads
from dotresize_fx.export.fuse_attention import OPSET, fuse_attention, mark_grouped_queries
from dotresize_fx.export.fuse_rotary import fuse_rotary
from dotresize_fx.export.fuse_skip_norms import fuse_skip_norms
from dotresize_fx.export.given_program import export_given, ready_to_emit
from dotresize_fx.export.join_table_gathers import join_table_gathers
from dotresize_fx.export.nodewise_program import NodewiseProgram
from dotresize_fx.export.onnx_file import ONNX_FILE, WEIGHTS_FILE
from dotresize_fx.export.weights_apart import WeightsApart
from dotresize_fx.fx_form.graph import FxGraph

# Of a graph with a cache, by the input.
FREE_SIZES = {
    "input_ids": {0: "batch_size", 1: "sequence_length"},
    "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
    POSITIONS: {0: "batch_size", 1: "sequence_length"},
    PAST: {0: "batch_size", 2: "past_sequence_length"},
}


def emit_onnx(model: torch.nn.Module, captured: Captured, graph: FxGraph, folder: Path, target: str = "any") -> Path:
    """Convert ``graph``, a rewriting of ``captured.graph``, and write it into ``folder``; returns model.onnx's path.

    A graph that cannot be fused for the ``target`` holds standard ops, as for "any". ``model`` only tells the exporter
    the names of inputs and outputs (it is run once on the tiny sample).
    """
    exported = None
    if target != "any":
        try:
            exported = _fused(model, captured, graph, target)
        except Exception:  # the converter knows fewer ops by their newer names, and torch raises what it likes
            exported = None
    if exported is None:
        exported = _standard(model, captured, graph)
    join_table_gathers(exported)
    RemoveUnusedNodesPass()(exported)
    if captured.cache is not None:
        _name_sizes(exported.graph)
    path = folder / ONNX_FILE
    try:
        onnx_ir.save(exported, str(path), external_data=WEIGHTS_FILE)
    except OSError as error:
        if error.errno is not None:
            raise
        # numpy writes the arrays, and says of a full disk no more than that some elements did not go.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
    return path


def _standard(model: torch.nn.Module, captured: Captured, graph: FxGraph) -> onnx_ir.Model:
    """Weights that are in files stay there until they are written, unless the converter computes with them."""
    for apart in (True, False):
        ready = ready_to_emit(graph)
        weights = WeightsApart(ready.program) if apart else None
        program = NodewiseProgram.of(ready.program)
        exported: onnx_ir.Model = export_given(OnnxExporter, OnnxConfig(dynamic=True), model, captured, program)
        if not weights or weights.put_back(exported):
            break
    return exported


def _fused(model: torch.nn.Module, captured: Captured, graph: FxGraph, target: str) -> onnx_ir.Model:
    ready = ready_to_emit(graph)
    mark_grouped_queries(ready)
    config = OnnxConfig(dynamic=True, ort_fusions=target, opset_version=OPSET)
    exported: onnx_ir.Model = export_given(OnnxExporter, config, model, captured, NodewiseProgram.of(ready.program))
    for rewrite in (fuse_rotary, fuse_attention, fit_rotary_tables, flatten_heads, fuse_skip_norms):
        rewrite(exported)
    return exported


def _name_sizes(graph: onnx_ir.Graph) -> None:
    """Free sizes by what they are, as Optimum calls them, in place of the tracer's numbers."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        wanted = FREE_SIZES[str(value.name).partition(".")[0]]
        for axis, name in wanted.items():
            names.setdefault(str(_sizes(value)[axis]), name)
    for value in (*graph.inputs, *graph.outputs):
        value.shape = onnx_ir.Shape([names.get(str(size), size) for size in _sizes(value)])


def _sizes(value: onnx_ir.Value) -> onnx_ir.Shape:
    assert value.shape is not None  # the exporter states those of every input and output
    return value.shape
