"""follow_back: the ways from an attention back to its linears, and where they are given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.passes.close_dimension import Escape
from dotresize_fx.passes.follow_heads import Way, follow_back

Trace = Callable[..., FxGraph]
Spelling = Callable[[Any, torch.Tensor], torch.Tensor]
LENGTH, SIZE = 3, 4


def split(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], LENGTH, -1, SIZE).transpose(1, 2)


def value_way(trace: Trace, spelling: Spelling, width: int = 8) -> Way:
    """The way back from the value of an attention over two or four heads."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        value = spelling(m, x)
        other = x[:, :, None, :SIZE].transpose(1, 2).expand(-1, value.shape[1], -1, -1)
        return F.scaled_dot_product_attention(other, other, value)

    parts = {"v": nn.Linear(8, width), "norm": nn.RMSNorm(width, eps=1e-6), "head_norm": nn.RMSNorm(SIZE, eps=1e-6)}
    graph = trace(forward, (2, LENGTH, 8), **parts)
    graph.remove_dead()  # asserts that tracing leaves
    attention = next(op for op in graph.ops if op.kind is Kind.ATTENTION)
    return follow_back(graph, attention, attention.inputs[2])


def repeated(x: torch.Tensor) -> torch.Tensor:
    return x.unsqueeze(2).expand(-1, -1, 2, -1, -1).contiguous().reshape(x.shape[0], 4, LENGTH, SIZE)


UNDERSTOOD: dict[str, tuple[Spelling, int, int]] = {
    "split and transposed": (lambda m, x: split(m.v(x)), 2, 1),
    "permuted": (lambda m, x: m.v(x).view(-1, LENGTH, 2, SIZE).permute(0, 2, 1, 3).contiguous(), 2, 1),
    "scaled before the split": (lambda m, x: split(m.v(x) * 0.5), 2, 1),
    "cast on the way": (lambda m, x: split(m.v(x).double()).float(), 2, 1),
    "repeated": (lambda m, x: repeated(split(m.v(x))), 2, 2),
    "behind an empty cache": (lambda m, x: torch.cat([x.new_zeros(0), split(m.v(x))], -2), 2, 1),
    "behind an axis of one": (lambda m, x: m.v(x.unsqueeze(1)).view(-1, LENGTH, 2, SIZE).transpose(1, 2), 2, 1),
    "a norm on the head": (lambda m, x: m.head_norm(split(m.v(x))), 2, 1),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_ways_that_are_understood(trace: Trace, name: str) -> None:
    spelling, heads, groups = UNDERSTOOD[name]
    way = value_way(trace, spelling)
    assert (way.heads, way.size, way.groups, way.linear.name) == (heads, SIZE, groups, "linear")
    assert bool(way.norms) == (name == "a norm on the head")
    assert len(way.of_heads) == len(way.of_size) == (3 if groups == 2 else 1)


def test_a_single_head(trace: Trace) -> None:
    """Its split keeps the width, and is a split all the same."""
    way = value_way(trace, lambda m, x: split(m.v(x)), width=SIZE)
    assert (way.heads, way.of_size) == (1, [("view", 3)])


def test_heads_counted_in_groups(trace: Trace) -> None:
    """Two parts of an axis that are joined again repeat nothing, but whole heads cannot be told to go."""
    way = value_way(trace, lambda m, x: split(m.v(x)).view(-1, 2, 1, LENGTH, SIZE).view(-1, 2, LENGTH, SIZE))
    assert (way.heads, way.groups, way.in_place) == (2, 1, "its heads are counted in groups")
    assert way.of_size == [("view_2", 3), ("view_1", 4), ("view", 3)]


def test_a_single_head_by_its_axis(trace: Trace) -> None:
    way = value_way(trace, lambda m, x: m.v(x).unsqueeze(1), width=SIZE)
    assert (way.heads, way.of_size, way.of_heads) == (1, [], [])


def outer_repeat(x: torch.Tensor) -> torch.Tensor:
    return x.unsqueeze(1).expand(-1, 2, -1, -1, -1).reshape(x.shape[0], 4, LENGTH, SIZE)


REFUSED: dict[str, tuple[Spelling, str]] = {
    "repeated in another order": (lambda m, x: outer_repeat(split(m.v(x))), "in an order that is not understood"),
    "a nonlinearity": (lambda m, x: torch.tanh(split(m.v(x))), "comes from tanh.default, which is not understood"),
    "something added": (
        lambda m, x: split(m.v(x)) + 1 * split(x),
        "not understood as a rotary embedding of two halves",
    ),
    "a cache that is not empty": (lambda m, x: torch.cat([split(x), split(m.v(x))], -2), "something that is no cache"),
    "a norm on all heads": (lambda m, x: split(m.norm(m.v(x))), "a norm acts on all heads together"),
    "no linear": (lambda m, x: split(x), "it comes from an input of the graph"),
    "packed": (lambda m, x: split(m.v(x).split(8, -1)[1]), "are packed in one weight"),
    "packed and sliced": (lambda m, x: split(m.v(x)[..., 8:]), "are packed in one weight"),
    "packed head by head": (
        lambda m, x: m.v(x).view(-1, LENGTH, 2, 8).transpose(1, 2).chunk(2, -1)[1],
        "packed in one weight, head by head",
    ),
    "heads inside": (
        lambda m, x: m.v(x).view(-1, LENGTH, SIZE, 2).permute(0, 3, 1, 2),
        "it is split into heads or reshaped",
    ),
    "read elsewhere": (lambda m, x: (v := split(m.v(x))) * v.sum(), "not understood"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_ways_that_are_not(trace: Trace, name: str) -> None:
    spelling, reason = REFUSED[name]
    with pytest.raises(Escape) as refused:
        value_way(trace, spelling, width=16 if name.startswith("packed") else 8)
    assert reason in refused.value.reason
