"""A block's twin in another basis is found again; plain averaging of the two is not the block, aligned averaging is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.align_blocks import align_blocks, distance, turn_block
from dotresize_fx.passes.cut_stream import apply_map
from dotresize_fx.passes.drop_layers import DropLayers
from dotresize_fx.passes.find_blocks import Block, find_blocks
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.merge_layers import MergeLayers
from dotresize_fx.region_map import RegionMap, random_admissible_map, random_rotation
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.rotary_map import real_matrix

# Of the largest output: float32 and weights that went through a basis and back.
SAME = 1e-5
ALPHA = 0.4


def copy_block(graph: FxGraph, first: Block, second: Block) -> None:
    """Give ``second`` the weights of ``first``."""
    for one, other in zip(first.ops, second.ops, strict=True):
        source = graph.op(one)
        if source.weight is not None:
            graph.set_weight(graph.op(other), graph.weight(source).clone())
        if (bias := graph.bias(source)) is not None:
            graph.set_bias(graph.op(other), bias.clone())


def another_basis(region: Region, generator: torch.Generator) -> RegionMap:
    """Neurons and heads in another order, values and scores rotated inside each head."""
    if region.kind in (RegionKind.HEADS, RegionKind.FFN):
        return random_admissible_map(region, generator)
    if region.symmetry is Symmetry.ROTARY_PAIRS:  # each pair stays where the tables turn it as they do
        angles = 2 * math.pi * torch.rand(region.heads, region.width // 2, generator=generator).double()
        down = real_matrix(torch.diag_embed(torch.polar(torch.ones_like(angles), angles)))
        return RegionMap(down, key_down=down, pairs=torch.arange(region.width // 2))
    down = torch.stack([random_rotation(region.width, generator) for _ in range(region.heads)])
    return RegionMap(down, down.mT) if region.kind is RegionKind.VALUE else RegionMap(down, key_down=down)


def twins(graph: FxGraph, seed: int = 0) -> tuple[Block, Block]:
    """Two blocks that compute the same, the second in random other bases."""
    first, second = find_blocks(graph)
    copy_block(graph, first, second)
    generator = torch.Generator().manual_seed(seed)
    for kinds in ((RegionKind.HEADS,), (RegionKind.QUERY_KEY, RegionKind.VALUE, RegionKind.FFN)):
        for region in find_regions(graph).of_kind(*kinds):
            if region.writers[0] in second.ops:
                apply_map(graph, region, another_basis(region, generator), True)
    return first, second


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "qwen2", "neox"])
def test_an_aligned_merge_with_its_twin_is_the_block(
    tiny_graph: Any, tiny_batch: Any, run: Any, difference: Any, kind: str
) -> None:
    _, graph = tiny_graph(kind)
    first, second = twins(graph)
    alone, plain = graph.copy(), graph.copy()
    DropLayers([second])(alone)
    MergeLayers(first, second, ALPHA)(plain)
    assert align_blocks(graph, first, second, check=True)
    MergeLayers(first, second, ALPHA)(graph)
    batch = tiny_batch(3, 11, 4)
    expected = run(alone, **batch)
    assert difference(run(graph, **batch), expected) < SAME
    assert difference(run(plain, **batch), expected) > 100 * SAME


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_twin_in_other_residual_coordinates(
    tiny_graph: Any, tiny_batch: Any, run: Any, difference: Any, kind: str
) -> None:
    """The stream that the twin reads is the block's times ``turn``."""
    _, graph = tiny_graph(kind)
    first, second = twins(graph)
    alone = graph.copy()
    DropLayers([second])(alone)
    turn = random_rotation(32, torch.Generator().manual_seed(3))
    assert turn_block(graph, first, second, turn.T)
    blind = graph.copy()
    align_blocks(blind, first, second)
    assert distance(blind, first, second) > 1
    records = align_blocks(graph, first, second, turn, check=True)
    assert records[0] == f"{second.end.name}: residual coordinates turned"
    MergeLayers(first, second, ALPHA)(graph)
    batch = tiny_batch(3, 11, 4)
    assert difference(run(graph, **batch), run(alone, **batch)) < SAME


def test_a_turn_that_brings_nothing_is_left_out(tiny_graph: Any) -> None:
    _, graph = tiny_graph("llama")
    first, second = twins(graph)
    turn = random_rotation(32, torch.Generator().manual_seed(3))
    assert not any("turned" in record for record in align_blocks(graph, first, second, turn))
    assert distance(graph, first, second) < 1e-9


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "qwen3", "gemma", "mixtral"])
def test_aligning_two_other_blocks_changes_no_output(
    tiny_graph: Any, tiny_batch: Any, run: Any, difference: Any, kind: str
) -> None:
    _, graph = tiny_graph(kind)
    first, second = find_blocks(graph)
    batch = tiny_batch(3, 11, 4)
    expected, before = run(graph, **batch), distance(graph, first, second)
    align_blocks(graph, first, second, check=True)
    assert difference(run(graph, **batch), expected) < SAME
    assert distance(graph, first, second) < before


def test_layer_norms_let_no_turn_pass(tiny_graph: Any, tiny_batch: Any, run: Any) -> None:
    _, graph = tiny_graph("gpt2")
    first, second = find_blocks(graph)
    batch = tiny_batch(2, 7)
    before = run(graph, **batch)[0]
    assert not turn_block(graph, first, second, random_rotation(32, torch.Generator()))
    assert torch.equal(run(graph, **batch)[0], before)
