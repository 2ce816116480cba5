"""Emit: a slim program as torch.export.save writes it, for PyTorch without transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from dotresize_fx.export.capture import Captured
from dotresize_fx.export.given_program import ready_to_emit
from dotresize_fx.export.quiet import quiet_libraries
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph

PT2_FILE = "model.pt2"


def emit_pt2(captured: Captured, graph: FxGraph, folder: Path) -> Path:
    """Write ``graph``, a rewriting of ``captured.graph``, into ``folder``; returns the file's path.

    It is called as the captured program was, with a cache ``past_key_values`` is a list of a dictionary a layer
    (``key``, ``value``), and holds nothing pickled but its example inputs, which load as plain tensors.
    """
    graph = ready_to_emit(graph)
    program = graph.program
    for node in graph.nodes.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    _narrow_examples(graph)
    if captured.vocabulary:
        _allow_one_token(program)
    path = folder / PT2_FILE
    with quiet_libraries():
        torch.export.save(program, path)
    return path


def _narrow_examples(graph: FxGraph) -> None:
    """The sample that was traced, as narrow as inputs have become: those of a cache."""
    nodes = iter(Execution(graph).inputs)

    def narrowed(value: Any) -> Any:
        node = next(nodes)
        if not isinstance(value, torch.Tensor):
            return value
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int) and size < value.shape[axis]:
                value = value.narrow(axis, 0, size)
        return value.contiguous()

    graph.program.example_inputs = pytree.tree_map(narrowed, graph.program.example_inputs)


def _allow_one_token(program: torch.export.ExportedProgram) -> None:
    """A size that was left to torch.export it states as 2 or more. Capture has tried 1 as well."""
    ranges = program.range_constraints
    for size, bounds in ranges.items():
        if size.is_Symbol and bounds.lower == 2:
            ranges[size] = ValueRanges(1, bounds.upper)
    for size in [size for size in ranges if not size.is_Symbol]:
        if size.free_symbols <= ranges.keys():
            ranges[size] = bound_sympy(size, {symbol: ranges[symbol] for symbol in size.free_symbols})
