"""SplitPackedLinears: a linear that is split into parts is one linear a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.split_packed_linears import SplitPackedLinears

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
# Products of fewer rows at a time may add up in another order: rounding only.
ROUNDING = 1e-6


def packed(m: Any, x: torch.Tensor) -> torch.Tensor:
    query, key, value = m.qkv(x).split(2, dim=-1)
    return m.out(query * key + value)


def parts(**changes: nn.Module) -> dict[str, nn.Module]:
    return {"qkv": nn.Linear(4, 6), "out": nn.Linear(2, 4), **changes}


def test_before_and_after(
    trace: Callable[..., FxGraph],
    text: Callable[[FxGraph], str],
    run: Callable[..., list[torch.Tensor]],
    difference: Callable[..., float],
) -> None:
    graph = trace(packed, (2, 4), **parts())
    assert (
        text(graph)
        == """\
linear_1: 6 = linear(x, qkv.weight[6,4], qkv.bias[6])
getitem_1: 2 = getitem()
getitem_2: 2 = getitem()
getitem_3: 2 = getitem()
mul_1: 2 = mul(getitem_1, getitem_2)
add_1: 2 = add(mul_1, getitem_3)
linear_2: 4 = linear(add_1, out.weight[4,2], out.bias[4])
return linear_2"""
    )
    before = run(graph, x=X)
    result = SplitPackedLinears()(graph)
    assert result.records == ("qkv.weight: seen as 3 linears",)
    assert (
        text(graph)
        == """\
linear_1: 2 = linear(x, qkv.0.weight[2,4], qkv.0.bias[2])
linear_2: 2 = linear(x, qkv.1.weight[2,4], qkv.1.bias[2])
linear_3: 2 = linear(x, qkv.2.weight[2,4], qkv.2.bias[2])
mul_1: 2 = mul(linear_1, linear_2)
add_1: 2 = add(mul_1, linear_3)
linear_4: 4 = linear(add_1, out.weight[4,2], out.bias[4])
return linear_4"""
    )
    assert "qkv.weight" not in graph.program.state_dict
    assert difference(run(graph, x=X), before) <= ROUNDING
    assert not SplitPackedLinears()(graph).modified


SPELLINGS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "chunk": lambda m, x: (t := m.qkv(x).chunk(3, -1))[0] * t[1] + t[2],
    "uneven": lambda m, x: (t := m.qkv(x).split([1, 2, 3], -1))[0] * t[1].sum(-1, keepdim=True) + t[2],
    "a part that nothing reads": lambda m, x: (t := m.qkv(x).split(2, -1))[0] * t[2],
    "parts that are outputs": lambda m, x: m.qkv(x).split(2, -1),
    "behind an axis of one": lambda m, x: (t := m.qkv(x).unsqueeze(1).split(3, -1))[0] * t[1],
    "sliced": lambda m, x: (t := m.qkv(x))[..., :3] * t[..., 3:],
    "by turns": lambda m, x: (t := m.qkv(x))[..., ::2] * t[..., 1::2],
    "sliced with a gap": lambda m, x: (t := m.qkv(x))[..., :2] * t[..., -2:],
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("bias", [True, False])
def test_spellings(trace: Any, run: Any, difference: Any, name: str, bias: bool) -> None:
    graph = trace(SPELLINGS[name], (2, 4), qkv=nn.Linear(4, 6, bias=bias))
    before = run(graph, x=X)
    assert SplitPackedLinears()(graph).modified
    graph.refresh_shapes()
    assert difference(run(graph, x=X), before) <= ROUNDING


NOT_PACKED: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "split along the batch": lambda m, x: sum(m.qkv(x.view(-1, 1, 4)).expand(-1, 2, 6).split(1, 1)),
    "read as a whole too": lambda m, x: sum((t := m.qkv(x)).split(2, -1)).sum() + t,
    "its weight used twice": lambda m, x: sum(m.qkv(x).split(2, -1)).sum() + m.qkv(2 * x),
    "split behind a function": lambda m, x: sum(torch.relu(m.qkv(x)).split(2, -1)),
    "slices that overlap": lambda m, x: (t := m.qkv(x))[..., :4] * t[..., 2:],
    "every other number alone": lambda m, x: m.qkv(x)[..., ::2],
    "by turns of unlike steps": lambda m, x: (t := m.qkv(x))[..., ::3].sum() * t[..., 1::2],
    "one slice": lambda m, x: m.qkv(x)[..., :3],
    "sliced along the batch": lambda m, x: (t := m.qkv(x))[:1] * t[1:2],
}


@pytest.mark.parametrize("name", NOT_PACKED)
def test_what_is_not_packed(trace: Any, name: str) -> None:
    graph = trace(NOT_PACKED[name], (2, 4), qkv=nn.Linear(4, 6))
    assert not SplitPackedLinears()(graph).modified


def test_the_rows_of_a_view(trace: Any, run: Any, difference: Any) -> None:
    def gated(m: Any, x: torch.Tensor) -> torch.Tensor:
        both = m.qkv(x).view(x.shape[0], 2, -1)
        return m.out(torch.relu(both[:, 0]) * both[:, 1])

    graph = trace(gated, (2, 4), **parts(out=nn.Linear(3, 4)))
    before = run(graph, x=X)
    assert SplitPackedLinears()(graph).records == ("qkv.weight: seen as 2 linears",)
    assert difference(run(graph, x=X), before) <= ROUNDING


def test_a_view_of_which_a_row_is_not_read_stays(trace: Any) -> None:
    graph = trace(lambda m, x: m.out(m.qkv(x).view(x.shape[0], 3, 2)[:, 1]), (2, 4), **parts())
    assert not SplitPackedLinears()(graph).modified
