"""RecognisePointwise: a convolution of single pixels is a linear of channels, and becomes one again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.recognise_pointwise import RecognisePointwise

IMAGE = torch.randn(3, 4, 2, 3, generator=torch.Generator().manual_seed(0))
ROUNDING = 1e-6  # the same products, added up in another order


def block(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.down(torch.relu(m.up(x)))


def test_before_and_after(trace: Any, text: Any, run: Any, difference: Any) -> None:
    graph = trace(block, (2, 4, 2, 3), up=nn.Conv2d(4, 8, 1), down=nn.Conv2d(8, 4, 1, bias=False))
    dense = text(graph)
    assert (
        dense
        == """\
conv2d_1: 3 = conv2d(x, up.weight[8,4,1,1], up.bias[8])
relu_1: 3 = relu(conv2d_1)
conv2d_2: 3 = conv2d(relu_1, down.weight[4,8,1,1])
return conv2d_2"""
    )
    before = run(graph, x=IMAGE)
    assert RecognisePointwise()(graph).records == (
        "up.weight: a convolution of single pixels seen as a linear",
        "down.weight: a convolution of single pixels seen as a linear",
    )
    assert (
        text(graph)
        == """\
permute_1: 4 = permute(x)
linear_1: 8 = linear(permute_1, up.weight[8,4], up.bias[8])
permute_2: 3 = permute(linear_1)
relu_1: 3 = relu(permute_2)
permute_3: 8 = permute(relu_1)
linear_2: 4 = linear(permute_3, down.weight[4,8])
permute_4: 3 = permute(linear_2)
return permute_4"""
    )
    assert difference(run(graph, x=IMAGE), before) <= ROUNDING
    assert [region.width for region in find_regions(graph).of_kind("ffn")] == [8]
    restored = graph.restore_pointwise()
    assert text(restored) == dense
    assert difference(run(restored, x=IMAGE), before) <= ROUNDING
    assert "linear_1" in text(graph)  # the copy alone was changed


def test_a_kernel_of_two_convolutions_stays_one(trace: Any) -> None:
    graph = trace(lambda m, x: m.same(torch.relu(m.same(x))), (2, 4, 5), same=nn.Conv1d(4, 4, 1))
    assert not RecognisePointwise()(graph).modified


def test_one_axis_of_places(trace: Any, run: Any, difference: Any) -> None:
    graph = trace(lambda m, x: m.down(torch.relu(m.up(x))), (2, 4, 5), up=nn.Conv1d(4, 6, 1), down=nn.Conv1d(6, 4, 1))
    x = IMAGE.flatten(2)[..., :5]
    before = run(graph, x=x)
    assert len(RecognisePointwise()(graph).records) == 2
    assert difference(run(graph, x=x), before) <= ROUNDING
    assert difference(run(graph.restore_pointwise(), x=x), before) <= ROUNDING


def test_a_view_of_what_it_puts_out_is_reshaped(trace: Any, run: Any, difference: Any) -> None:
    graph = trace(lambda m, x: m.up(x).view(-1, 8 * 6), (2, 4, 2, 3), up=nn.Conv2d(4, 8, 1))
    before = run(graph, x=IMAGE)
    assert RecognisePointwise()(graph).modified
    assert difference(run(graph, x=IMAGE), before) <= ROUNDING


@pytest.mark.parametrize(
    "changes", [{"stride": 2}, {"padding": 1}, {"groups": 2}, {"kernel_size": (1, 2)}, {"kernel_size": (2, 1)}]
)
def test_other_convolutions_stay(trace: Any, changes: Any) -> None:
    graph = trace(block, (2, 4, 3, 3), up=nn.Conv2d(4, 8, **{"kernel_size": 1, **changes}), down=nn.ReLU())
    assert not RecognisePointwise()(graph).modified


def test_a_linear_of_rows_stays_one(trace: Any, text: Any) -> None:
    graph = trace(lambda m, x: m.up(x.transpose(1, 2)), (2, 4, 3), up=nn.Linear(4, 8))
    assert text(graph.restore_pointwise()) == text(graph)
