"""Emit: a slim program for ExecuTorch (XNNPACK, CPU), by transformers' exporter.

ExecuTorch plans all memory beforehand, for the largest sizes, so these are stated: :func:`largest_sizes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from dotresize_fx.cache_names import PAST
from dotresize_fx.export.capture import Captured
from dotresize_fx.export.given_program import export_given, ready_to_emit
from dotresize_fx.fx_form.graph import FxGraph

EXECUTORCH_FILE = "model.pte"
# Sequences, new tokens and tokens before them, where the model takes so many. A batch of no more than the two that
# were traced would become a constant.
LARGEST_BATCH, LARGEST_LENGTH, LARGEST_PAST = 4, 256, 2048


def largest_sizes(captured: Captured) -> dict[str, int]:
    """The largest batch, length and, with a cache, past that the file takes."""
    sizes = {"batch": LARGEST_BATCH, "length": min(LARGEST_LENGTH, captured.longest)}
    return sizes | ({"past": min(LARGEST_PAST, captured.longest)} if captured.cache else {})


def emit_executorch(model: torch.nn.Module, captured: Captured, graph: FxGraph, folder: Path) -> Path:
    """Write ``graph``, a rewriting of ``captured.graph``, into ``folder``; returns the .pte's path."""
    from transformers.exporters.configs import ExecutorchConfig
    from transformers.exporters.exporter_executorch import ExecutorchExporter

    graph = ready_to_emit(graph)
    with _bounded(graph, largest_sizes(captured)):
        made = export_given(ExecutorchExporter, ExecutorchConfig(dynamic=True), model, captured, graph.program)
    path = folder / EXECUTORCH_FILE
    ExecutorchExporter.save_program(made, path)
    return path


@contextmanager
def _bounded(graph: FxGraph, largest: Mapping[str, int]) -> Iterator[None]:
    """Inside, the program's sizes, and its symbols, which all copies share, have these bounds."""
    program = graph.program
    values = {node.name: node.meta["val"] for node in graph.nodes.nodes if node.op == "placeholder"}
    ids = values["input_ids"]
    axes: list[tuple[Any, int, int]] = [(ids.shape[0], 1, largest["batch"]), (ids.shape[1], 1, largest["length"])]
    past = next((value for name, value in values.items() if name.startswith(PAST)), None)
    if past is not None:
        axes.append((past.shape[2], 0, largest["past"]))
    bounds = {size.node.expr: ValueRanges(low, high) for size, low, high in axes if isinstance(size, torch.SymInt)}
    ranges = program.range_constraints
    for size in list(ranges):
        known = bounds | {symbol: ranges[symbol] for symbol in size.free_symbols - bounds.keys()}
        ranges[size] = bound_sympy(size, known)
    known_sizes = ids.fake_mode.shape_env.var_to_range
    before = dict(known_sizes)
    known_sizes.update(bounds)
    try:
        yield
    finally:
        known_sizes.clear()
        known_sizes.update(before)
