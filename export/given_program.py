"""transformers' exporters, given a program where they would trace the model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from transformers.exporters.exporter_dynamo import DynamoExporter

from dotresize_fx.export.capture import Captured, no_fast_path
from dotresize_fx.export.quiet import quiet_libraries
from dotresize_fx.export.rules_by_op import rules_by_op
from dotresize_fx.export.shallow_forward import fitted_to, guard_layers_left
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.fx_form.simplify import simplify


def ready_to_emit(graph: FxGraph) -> FxGraph:
    """A copy with the ops that runtimes know, shapes up to date, and nothing computed twice."""
    graph = graph.restore_pointwise()
    graph.refresh_shapes()
    simplify(graph)
    guard_layers_left(graph.program)
    return graph


def export_given(
    exporter: type[DynamoExporter],
    config: Any,
    model: torch.nn.Module,
    captured: Captured,
    program: torch.export.ExportedProgram,
) -> Any:
    """What ``exporter`` makes of ``program``, a rewriting of the captured one; it may change it.

    ``model`` only tells the names of inputs and outputs: it is run once on the tiny sample.
    """
    captured = fitted_to(captured, program)
    cached = captured.cache
    sample = dict(captured.sample if cached is None else cached.sample)
    given = type(f"Given{exporter.__name__}", (exporter, _GivenProgram), {})
    named = cached.on(model) if cached else nullcontext()
    with quiet_libraries(), no_fast_path(), rules_by_op(), torch.no_grad(), named:
        made = given()  # inside: it warns of versions when it is made
        made.program, made.metadata = program, captured.metadata
        return made.export(model, sample, config).program


class _GivenProgram(DynamoExporter):  # type: ignore[misc]
    """Hands a program over in place of tracing one."""

    program: torch.export.ExportedProgram
    metadata: Any

    def export_program(self, model: torch.nn.Module, sample_inputs: Mapping[str, Any], config: Any) -> Any:
        model(**sample_inputs)  # the exporter records the names of inputs and outputs while this runs
        return self.program, self.metadata
