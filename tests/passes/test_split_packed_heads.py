"""SplitPackedHeads: query, key and value that stand head by head in one weight become a linear each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.passes.split_packed_heads import SplitPackedHeads

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
HEADS, SIZE = 2, 3


def neox(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A view, a permutation, parts of the last axis."""
    a, b, c = m.packed(x).view(x.shape[0], 5, HEADS, 3 * SIZE).transpose(1, 2).chunk(3, -1)
    return a * b + c


def bloom(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A view with an axis of parts."""
    whole = m.packed(x).view(x.shape[0], 5, HEADS, 3, SIZE)
    return whole[..., 0, :] * whole[..., 1, :] + whole[..., 2, :]


def latent(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Parts of two sizes, behind a reshape that the view undoes."""
    whole = m.packed(x.view(x.shape[0], 1, 5, 4)).view(x.shape[0], 5, HEADS, 3 * SIZE).transpose(1, 2)
    first, second = whole.split([SIZE, 2 * SIZE], -1)
    return first.sum(-1, keepdim=True) * second + torch.zeros_like(second)


def modern(m: Any, x: torch.Tensor) -> torch.Tensor:
    """An axis of parts in front of the heads."""
    a, b, c = m.packed(x).view(x.shape[0], 5, 3, HEADS, SIZE).unbind(2)
    return a * b + c


PACKED = [(neox, [6, 6, 6]), (bloom, [6, 6, 6]), (latent, [6, 12]), (modern, [6, 6, 6])]


@pytest.mark.parametrize(("forward", "widths"), PACKED)
@pytest.mark.parametrize("bias", [False, True])
def test_each_part_becomes_a_linear(
    trace: Callable[..., FxGraph], run: Callable[..., list[torch.Tensor]], forward: Any, widths: list[int], bias: bool
) -> None:
    graph = trace(forward, (2, 5, 4), packed=nn.Linear(4, 3 * HEADS * SIZE, bias=bias))
    before = run(graph, x=X)
    assert SplitPackedHeads()(graph).modified
    linears = [op for op in graph.ops if op.kind is Kind.LINEAR]
    assert sorted(op.output.width or 0 for op in linears) == widths
    assert all((op.bias is not None) == bias for op in linears)
    assert all(op.inputs[0].shape[1:] == (5, 4) for op in linears)
    assert torch.allclose(run(graph, x=X)[0], before[0], atol=1e-6)  # the same products, in other blocks


OTHERS = {
    "a part that nothing takes": lambda m, x: m.packed(x).view(x.shape[0], 5, HEADS, 9)[..., :3],
    "parts that overlap": lambda m, x: (w := m.packed(x).view(x.shape[0], 5, HEADS, 9))[..., :6] + w[..., 3:],
    "read as a whole": lambda m, x: (w := m.packed(x).view(x.shape[0], 5, HEADS, 9))[..., :6] * w.sum(),
    "numbers chosen one by one": lambda m, x: (
        (w := m.packed(x).view(x.shape[0], 5, 6, 3))[..., 0] * w[..., 1] + w[..., 2]
    ),
    "its shape is read": lambda m, x: (
        (w := m.packed(x).view(x.shape[0], 5, HEADS, 9))[..., :4].sum()
        + w[..., 4:].sum()
        + torch.zeros_like(torch.empty_like(w))
    ),
    "numbers by their axis": lambda m, x: sum(m.packed(x).view(x.shape[0], 5, 3, HEADS, SIZE).unbind(3)),
    "not packed": lambda m, x: m.packed(x).view(x.shape[0], 5, HEADS, 9).transpose(1, 2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_stays(trace: Callable[..., FxGraph], name: str) -> None:
    graph = trace(OTHERS[name], (2, 5, 4), packed=nn.Linear(4, 3 * HEADS * SIZE))
    assert not SplitPackedHeads()(graph).modified
