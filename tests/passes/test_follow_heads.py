"""follow_back and follow_on: the ways between an attention and its linears, and where they are given up."""

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
from dotresize_fx.passes.follow_mixed import follow_on

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


def outer_repeat(x: torch.Tensor) -> torch.Tensor:
    return x.unsqueeze(1).expand(-1, 2, -1, -1, -1).reshape(x.shape[0], 4, LENGTH, SIZE)


REFUSED: dict[str, tuple[Spelling, str]] = {
    "repeated in another order": (lambda m, x: outer_repeat(split(m.v(x))), "in an order that is not understood"),
    "a nonlinearity": (lambda m, x: torch.tanh(split(m.v(x))), "comes from tanh.default, which is not understood"),
    "something added": (
        lambda m, x: split(m.v(x)) + 1 * split(x),
        "not understood as a rotary embedding of two halves",
    ),
    "a cache that is not empty": (lambda m, x: torch.cat([split(x), split(m.v(x))], -2), "not an empty cache"),
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


def result_way(trace: Trace, spelling: Spelling) -> Way:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return spelling(m, F.scaled_dot_product_attention(split(x), split(x), split(x)))

    shapes = {"mask": (1, 1, LENGTH, 1), "by_head": (1, 2, 1, 1), "by_number": (1, 1, 1, SIZE)}
    masks = {name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}
    graph = trace(forward, (2, LENGTH, 8), o=nn.Linear(8, 6), gate=nn.Linear(8, 8), **masks)
    return follow_on(graph, next(op for op in graph.ops if op.kind is Kind.ATTENTION))


def merge(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], LENGTH, -1)


def hidden(x: torch.Tensor, mask: torch.Tensor, number: float) -> torch.Tensor:
    return torch.where(mask > 1, torch.full((), number), x)


def test_the_result_is_merged_and_read(trace: Trace) -> None:
    way = result_way(trace, lambda m, x: m.o(merge(x)))
    assert (way.heads, way.size, way.linear.name) == (2, SIZE, "linear")
    assert way.of_heads == way.of_size == [("reshape", 2)]


@pytest.mark.parametrize(("mask", "by_head"), [("mask", False), ("by_head", True)])
def test_a_result_may_be_hidden(trace: Trace, mask: str, by_head: bool) -> None:
    way = result_way(trace, lambda m, x: m.o(merge(hidden(x, getattr(m, mask), 0))))
    assert (way.linear.name, way.by_head) == ("linear", by_head)


RESULTS: dict[str, tuple[Spelling, str]] = {
    "hidden by another number": (lambda m, x: m.o(merge(hidden(x, m.mask, 1))), "where"),
    "hidden number by number": (lambda m, x: m.o(merge(hidden(x, m.by_number, 0))), "where"),
    "a gate": (lambda m, x: m.o(torch.sigmoid(m.gate(merge(x))) * merge(x)), "several ops read it"),
    "merged the other way": (lambda m, x: m.o(x.permute(0, 2, 3, 1).reshape(x.shape[0], LENGTH, 8)), "reshaped"),
    "heads apart": (lambda m, x: x.transpose(1, 2), "it is an output of the graph"),
    "a nonlinearity": (lambda m, x: m.o(merge(x).relu()), "it goes into relu.default, which is not understood"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_that_are_refused(trace: Trace, name: str) -> None:
    spelling, reason = RESULTS[name]
    with pytest.raises(Escape) as refused:
        result_way(trace, spelling)
    assert reason in refused.value.reason
