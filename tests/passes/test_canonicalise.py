"""The rewrites in their order: casts go first, so that norms and linears are seen behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dotresize_fx.graph import Kind
from dotresize_fx.passes.canonicalise import canonicalise


def test_a_decomposed_norm_behind_a_cast_becomes_one_op(trace: Any, run: Any, difference: Any) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        return m.up(m.gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype))

    graph = trace(forward, (2, 4), up=nn.Linear(4, 8), gain=nn.Parameter(torch.ones(4)))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    before = run(graph, x=x)
    assert canonicalise(graph, check=True).modified
    assert [op.kind for op in graph.ops] == [Kind.RMS_NORM, Kind.LINEAR]
    # One rounding of a float32 mean apart.
    assert difference(run(graph, x=x), before) <= 1e-6
    assert not canonicalise(graph, check=True).modified
