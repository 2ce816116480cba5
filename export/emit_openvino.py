"""Emit: a slim program as an OpenVINO model, by transformers' exporter; inputs and outputs are those of the ONNX."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from dotresize_fx.export.capture import Captured
from dotresize_fx.export.given_program import export_given, ready_to_emit
from dotresize_fx.export.nodewise_program import NodewiseProgram
from dotresize_fx.export.quiet import quiet_libraries
from dotresize_fx.fx_form.graph import FxGraph

OPENVINO_FILE = "openvino_model.xml"
aten = torch.ops.aten


def emit_openvino(model: torch.nn.Module, captured: Captured, graph: FxGraph, folder: Path) -> Path:
    """Write ``graph``, a rewriting of ``captured.graph``, into ``folder`` in float32; returns the .xml's path."""
    from transformers.exporters.configs import OpenVINOConfig
    from transformers.exporters.exporter_openvino import OpenVINOExporter

    graph = ready_to_emit(graph)
    scale_queries(graph)
    config = OpenVINOConfig(dynamic=True, stateful=False)
    made = export_given(OpenVINOExporter, config, model, captured, NodewiseProgram.of(graph.program))
    path = folder / OPENVINO_FILE
    with quiet_libraries():
        OpenVINOExporter.save_program(made, path)
    return path


def scale_queries(graph: FxGraph) -> None:
    """Multiply queries so that attention scales by 1 / sqrt(size of a head), in place.

    The converter does not read the op's scale, and heads that were cut keep that of their size before.
    """
    for node in graph.nodes.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        scale = node.kwargs.get("scale")
        query = node.args[0]
        if scale is None:
            continue
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "scale"}
        factor = scale * math.sqrt(query.meta["val"].shape[-1])
        if math.isclose(factor, 1, rel_tol=1e-12):
            continue
        with graph.nodes.inserting_before(node):
            scaled = graph.nodes.call_function(aten.mul.Tensor, (query, factor))
        scaled.meta["val"] = query.meta["val"].clone()
        node.args = (scaled, *node.args[1:])  # keys may be the same tensor
