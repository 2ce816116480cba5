"""FoldChannelScales: a scale or a bias behind a linear goes into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.passes.fold_channel_scales import FoldChannelScales

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
# Weights are multiplied in float64 and rounded to float32 once.
ROUNDING = 1e-6


def vectors() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.empty(6)) for name in ("scale", "shift")}


def scaled(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.up(x) * m.scale + m.shift


@pytest.mark.parametrize("bias", [False, True])
def test_before_and_after(
    trace: Callable[..., FxGraph],
    text: Callable[[FxGraph], str],
    run: Callable[..., list[torch.Tensor]],
    difference: Callable[..., float],
    bias: bool,
) -> None:
    graph = trace(scaled, (2, 4), up=nn.Linear(4, 6, bias=bias), **vectors())
    before = run(graph, x=X)
    assert len(FoldChannelScales()(graph).records) == 2
    assert text(graph) == "linear_1: 6 = linear(x, up.weight[6,4], up.bias[6])\nreturn linear_1"
    assert difference(run(graph, x=X), before) <= ROUNDING


OTHERS = {
    "read twice": lambda m, x: (h := m.up(x)) * m.scale + h,
    "a shared weight": lambda m, x: m.up(x) * m.scale + m.up(x + 1),
    "a number a row": lambda m, x: m.up(x) * x[:, :1],
    "subtracted from": lambda m, x: m.shift - m.up(x),
    "added a matrix": lambda m, x: m.up(x) + m.square,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_stays(trace: Callable[..., FxGraph], name: str) -> None:
    square = nn.Parameter(torch.empty(1, 6))
    graph = trace(OTHERS[name], (2, 4), up=nn.Linear(4, 6), square=square, **vectors())
    assert not FoldChannelScales()(graph).modified
    assert any(op.kind in (Kind.ADD, Kind.MUL) for op in graph.ops)
