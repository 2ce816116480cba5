"""RecognisePatches: a convolution that steps by its own size is a linear of each patch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.open_stream import open_stream
from dotresize_fx.passes.prove_exactness import BOUND, BROKEN, map_regions
from dotresize_fx.passes.recognise_patches import RecognisePatches
from dotresize_fx.region_map import random_admissible_map, random_wrong_map
from dotresize_fx.regions import Symmetry

SHAPE = (2, 3, 4, 6)
IMAGE = torch.randn(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
ROUNDING = 1e-6  # the same products, added up in another order


def joined(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.out(m.patches(x).flatten(2).transpose(1, 2))


def last(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.out(m.patches(x).permute(0, 2, 3, 1))


def patches(**changes: Any) -> dict[str, nn.Module]:
    return {"patches": nn.Conv2d(3, 8, **{"kernel_size": (2, 3), "stride": (2, 3), **changes}), "out": nn.Linear(8, 5)}


def test_before_and_after(trace: Any, text: Any, run: Any, difference: Any) -> None:
    graph = trace(joined, SHAPE, **patches())
    assert (
        text(graph)
        == """\
conv2d_1: 2 = conv2d(x, patches.weight[8,3,2,3], patches.bias[8])
flatten_1: 4 = flatten(conv2d_1)
transpose_1: 8 = transpose(flatten_1)
linear_1: 5 = linear(transpose_1, out.weight[5,8], out.bias[5])
return linear_1"""
    )
    before = run(graph, x=IMAGE)
    assert RecognisePatches()(graph).records == ("patches.weight: a convolution of patches seen as a linear",)
    assert (
        text(graph)
        == """\
reshape_1: 3 = reshape(x)
permute_1: 3 = permute(reshape_1)
reshape_2: 18 = reshape(permute_1)
linear_1: 8 = linear(reshape_2, patches.weight[8,18], patches.bias[8])
linear_2: 5 = linear(linear_1, out.weight[5,8], out.bias[5])
return linear_2"""
    )
    assert difference(run(graph, x=IMAGE), before) <= ROUNDING


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"padding": "valid"}])
def test_rows_and_columns_that_stay_apart(trace: Any, run: Any, difference: Any, changes: Any) -> None:
    graph = trace(last, SHAPE, **patches(**changes))
    before = run(graph, x=IMAGE)
    assert RecognisePatches()(graph).modified
    assert difference(run(graph, x=IMAGE), before) <= ROUNDING


@pytest.mark.parametrize(
    "changes",
    [{"stride": (1, 3)}, {"padding": (1, 0)}, {"kernel_size": (3, 3), "stride": (3, 3)}, {"dilation": (2, 1)}],
)
def test_other_convolutions_stay(trace: Any, changes: Any) -> None:
    """Patches that overlap, are padded, leave a row out or have holes."""
    assert not RecognisePatches()(trace(last, SHAPE, **patches(**changes))).modified


def vision(m: Any, x: torch.Tensor) -> torch.Tensor:
    rows = m.patches(x).flatten(2).transpose(1, 2)
    stream = torch.cat([m.token.expand(x.shape[0], -1, -1), rows], 1) + m.places
    stream = stream + m.down(torch.relu(m.up(m.norm(stream))))
    return m.out(m.final(stream)[:, 0]) + m.out(m.final(stream[:, 1:].mean(1)))


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_tokens_and_positions_write_the_stream(trace: Any, run: Any, difference: Any, norm: Any) -> None:
    parts = patches() | {"up": nn.Linear(8, 12), "down": nn.Linear(12, 8), "norm": norm(8), "final": norm(8)}
    parts |= {"token": nn.Parameter(torch.empty(1, 1, 8)), "places": nn.Parameter(torch.empty(1, 5, 8))}
    dense = trace(vision, SHAPE, **parts)
    RecognisePatches()(dense)
    (stream,) = find_regions(dense).of_kind("residual")
    assert stream.symmetry is Symmetry.ORTHOGONAL
    assert len(stream.tables) == 2
    expected = run(dense, x=IMAGE)
    opened = dense.copy()
    open_stream(opened, stream)
    assert difference(run(opened, x=IMAGE), expected) <= BOUND
    for draw, good in ((random_admissible_map, True), (random_wrong_map, False)):
        graph = dense.copy()
        assert map_regions(graph, ("residual",), draw) == 1
        found = difference(run(graph, x=IMAGE), expected)
        assert found <= BOUND if good else found >= BROKEN
