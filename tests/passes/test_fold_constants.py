"""FoldConstants: what parameters alone decide is a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.passes.fold_constants import LARGEST, FoldConstants

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def one_plus(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A gain as Gemma spells it."""
    return torch.nn.functional.rms_norm(x, (4,), 1.0 + m.gain.float(), 1e-6)


def test_before_and_after(
    trace: Callable[..., FxGraph], text: Callable[[FxGraph], str], run: Callable[..., list[torch.Tensor]]
) -> None:
    graph = trace(one_plus, (2, 4), gain=nn.Parameter(torch.empty(4)))
    before = run(graph, x=X)
    assert [op.kind for op in graph.ops if op.output.shape][-1] is Kind.OTHER
    assert FoldConstants()(graph).modified
    (norm,) = (op for op in graph.ops if op.output.shape)
    assert (norm.kind, graph.parameter_name(norm.weight)) == (Kind.RMS_NORM, "gain_to_add")  # type: ignore[arg-type]
    assert "gain[4]" not in text(graph)
    assert torch.equal(run(graph, x=X)[0], before[0])


def test_what_is_large_or_a_matrix_or_reads_an_input_stays(trace: Callable[..., FxGraph]) -> None:
    parts = {"long": nn.Parameter(torch.empty(LARGEST + 1)), "square": nn.Parameter(torch.empty(4, 4))}
    graph = trace(lambda m, x: x + (m.long + 1)[:4] + (m.square + 1).sum() + (x + 1), (2, 4), **parts)
    names = [op.output.name for op in graph.ops]
    FoldConstants()(graph)
    # The slice of the long one is small, and what it is sliced from is computed: it stays too.
    assert [op.output.name for op in graph.ops] == names
