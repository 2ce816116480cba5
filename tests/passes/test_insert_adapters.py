"""A stream parted by adapters: the same function, and between any two norms a basis of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.cut_stream import apply_map
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.insert_adapters import InsertAdapters, InsertPostNormAdapters, post_norms
from dotresize_fx.passes.open_stream import open_stream
from dotresize_fx.passes.prove_exactness import BOUND, BROKEN
from dotresize_fx.region_map import RegionMap, random_admissible_map, random_wrong_map
from dotresize_fx.regions import Region, Symmetry

Draw = Callable[[Region, torch.Generator], RegionMap]
# By model, how many dimensions its stream falls into: one a norm; NeoX adds attention and FFN to one and the same.
PARTS = {"llama": 5, "gpt2": 5, "qwen2": 5, "neox": 3, "bert": 5}


def parted(graph: FxGraph) -> list[Region]:
    """The stream's parts, opened."""
    if post_norms(graph):
        InsertPostNormAdapters()(graph)
        for norms in [region.norms for region in find_regions(graph).of_kind("residual")]:
            open_stream(graph, next(r for r in find_regions(graph).of_kind("residual") if r.norms == norms))
    else:
        opened, _ = open_stream(graph, next(find_regions(graph).of_kind("residual")))
        InsertAdapters(opened)(graph)
    return list(find_regions(graph).of_kind("residual"))


def turned(graph: FxGraph, draw: Draw) -> int:
    """Fold another full-width map into every part."""
    generator = torch.Generator().manual_seed(0)
    regions = parted(graph)
    for region in regions:
        assert region.symmetry is Symmetry.ORTHOGONAL
        apply_map(graph, region, draw(region, generator), True)
    return len(regions)


@pytest.mark.parametrize("kind", PARTS)
def test_a_basis_for_each_part_changes_nothing(
    tiny_graph: Any, tiny_batch: Any, run: Any, difference: Any, kind: str
) -> None:
    _, dense = tiny_graph(kind)
    graph = dense.copy()
    assert turned(graph, random_admissible_map) == PARTS[kind]
    batch = tiny_batch(3, 11, 4)
    assert difference(run(graph, **batch), run(dense, **batch)) <= BOUND


@pytest.mark.parametrize("kind", PARTS)
def test_a_map_that_is_no_rotation_breaks_it(
    tiny_graph: Any, tiny_batch: Any, run: Any, difference: Any, kind: str
) -> None:
    _, dense = tiny_graph(kind)
    graph = dense.copy()
    turned(graph, random_wrong_map)
    batch = tiny_batch(3, 11, 4)
    assert difference(run(graph, **batch), run(dense, **batch)) > BROKEN


def test_before_and_after(trace: Any, text: Any) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        stream = m.first(x)
        return m.head(m.last(stream + m.down(torch.relu(m.up(m.norm(stream))))))

    def linear(a: int, b: int) -> nn.Linear:
        return nn.Linear(a, b, bias=False)

    def norm() -> nn.RMSNorm:
        return nn.RMSNorm(8, eps=1e-5, elementwise_affine=False)

    parts = {"first": linear(6, 8), "up": linear(8, 16), "down": linear(16, 8), "norm": norm(), "last": norm()}
    graph = trace(forward, (2, 6), **parts, head=linear(8, 3))
    (stream,) = find_regions(graph).of_kind("residual")
    before = text(graph).splitlines()
    result = InsertAdapters(stream)(graph)
    assert len(result.records) == 1
    after = text(graph).splitlines()
    assert [line for line in after if "adapter" in line] == [
        "linear_2: 8 = linear(linear_1, linear_adapter.weight[8,8])"
    ]
    assert any(line.startswith("add_1: 8 = add(linear_2, ") for line in after)
    assert len(after) == len(before) + 1


def test_what_no_norm_reads_or_nothing_skips_gets_none(tiny_graph: Any) -> None:
    """The last norm's stream is added to nothing, a pre-norm model has no post-norm."""
    _, graph = tiny_graph("llama")
    assert post_norms(graph) == []
    assert not InsertPostNormAdapters()(graph).modified
    (stream,) = find_regions(graph).of_kind("residual")
    opened, _ = open_stream(graph, stream)
    assert len(InsertAdapters(opened)(graph).records) == len(opened.norms) - 1
