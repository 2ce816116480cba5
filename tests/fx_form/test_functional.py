"""What writes in place, and what only parameters decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.nn import functional as F

from dotresize_fx.fx_form.graph import FxGraph

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_sums_in_place_become_sums(trace: Callable[..., FxGraph], run: Any) -> None:
    graph = trace(lambda m, x: (x * 2).add_(1) + 1, (2, 4))
    before = run(graph, x=X)
    assert len(graph.drop_in_place()) == 1
    assert not any("add_" in str(node.target) for node in graph.nodes.nodes)
    assert torch.equal(run(graph, x=X)[0], before[0])


def through_a_part(m: Any, x: torch.Tensor) -> torch.Tensor:
    whole = x * 2
    part, _ = whole.chunk(2, -1)
    part += 1
    return whole * 3


def through_dropout(m: Any, x: torch.Tensor) -> torch.Tensor:
    whole = x * 2
    kept = F.dropout(whole, 0.5, False)
    kept += 1
    return whole * 3


SEEN: dict[str, Any] = {
    "through a slice": lambda m, x: (y := x * 2)[:1].add_(1).sum() + y,
    "through a part of a split": through_a_part,
    "through dropout, which hands its input on": through_dropout,
    "of another dtype": lambda m, x: (x * 2).to(torch.bfloat16).add_(x),
    "of an input": lambda m, x: x.add_(1) * 2,
}


@pytest.mark.parametrize("name", SEEN)
def test_what_something_else_sees_stays(trace: Callable[..., FxGraph], run: Any, name: str) -> None:
    graph = trace(SEEN[name], (2, 4))
    before = run(graph, x=X.clone())
    assert not graph.drop_in_place()
    assert torch.equal(run(graph, x=X.clone())[0], before[0])


def written(m: Any, x: torch.Tensor) -> torch.Tensor:
    copied = m.gain.clone()
    copied[0] = x.sum()
    return x * copied


CHANGING: dict[str, Any] = {
    "drawn anew each time": lambda m, x: x + torch.rand_like(m.gain),
    "written to afterwards": written,
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_is_no_constant(trace: Callable[..., FxGraph], name: str) -> None:
    assert not trace(CHANGING[name], (2, 4), gain=Parameter(torch.empty(4))).fold_constants(100)


def test_an_output_of_parameters_alone(trace: Callable[..., FxGraph], run: Any) -> None:
    graph = trace(lambda m, x: (x * 2, 1 + m.gain), (2, 4), gain=Parameter(torch.empty(4)))
    before = run(graph, x=X)
    assert len(graph.fold_constants(100)) == 1
    names = [spec.arg.name for spec in graph.program.graph_signature.output_specs]
    assert names[1] == graph.nodes.output_node().args[0][1].name  # type: ignore[index, union-attr]
    assert torch.equal(run(graph, x=X)[1], before[1])
