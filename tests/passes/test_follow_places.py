"""A width that is followed where it is not the last axis: behind permutations, views and ops of each channel alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.choose_regions import why_not_cut
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.fold_linears import FoldLinears
from dotresize_fx.passes.insert_maps import InsertMaps
from dotresize_fx.passes.prove_exactness import BOUND, BROKEN, map_regions
from dotresize_fx.region_map import RegionMap, random_admissible_map, random_wrong_map, selection
from dotresize_fx.regions import Region, Symmetry

Forward = Callable[..., torch.Tensor]
ROWS = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 4, 2, 3, generator=torch.Generator().manual_seed(0))


def as_image(m: Any, x: torch.Tensor) -> torch.Tensor:
    image = m.up(x).transpose(1, 2).view(-1, 8, 2, 3)
    return x + m.down(F.gelu(m.depth(image).flatten(2).transpose(1, 2)))


def along_the_rows(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x + m.down(torch.relu(m.causal(m.up(x).transpose(1, 2)).transpose(1, 2)))


def pixels(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x + m.out(F.gelu(m.wide(x)))


def inverted(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = F.relu6(m.norm(m.wide(x)))
    return x + m.out(F.relu6(m.other(m.depth(F.pad(h, (1, 0, 0, 1))))) * m.scale)


def pooled_gate(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = F.silu(m.depth(m.wide(x)))
    return x + m.out(h * torch.sigmoid(m.open(m.shut(h.mean((2, 3), keepdim=True)))))


FORWARDS: dict[Forward, torch.Tensor] = {
    as_image: ROWS,
    along_the_rows: ROWS,
    pixels: IMAGES,
    inverted: IMAGES,
    pooled_gate: IMAGES,
}


def graph_of(trace: Callable[..., FxGraph], forward: Forward, shape: tuple[int, ...]) -> FxGraph:
    parts: dict[str, Any] = {"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}
    parts |= {"wide": nn.Conv2d(4, 8, 1), "out": nn.Conv2d(8, 4, 1), "shut": nn.Conv2d(8, 2, 1)}
    parts |= {"open": nn.Conv2d(2, 8, 1), "depth": nn.Conv2d(8, 8, 3, padding=1, groups=8)}
    parts |= {"causal": nn.Conv1d(8, 8, 3, padding=1, groups=8), "scale": nn.Parameter(torch.empty(8, 1, 1))}
    parts |= {"norm": nn.BatchNorm2d(8), "other": nn.BatchNorm2d(8)}
    if forward is inverted:
        parts["depth"] = nn.Conv2d(8, 8, (2, 2), groups=8)
    for name in ("norm", "other"):
        parts[name].running_mean.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
        parts[name].running_var.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    graph = trace(forward, (2, *shape[1:]), **parts)
    canonicalise(graph)
    return graph


def ffn_of(graph: FxGraph) -> Region:
    return max(find_regions(graph).of_kind("ffn"), key=lambda region: region.width)


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_other_orders_pass_and_rotations_do_not(trace: Any, run: Any, difference: Any, forward: Forward) -> None:
    x = FORWARDS[forward]
    dense = graph_of(trace, forward, x.shape)
    region = ffn_of(dense)
    assert region.symmetry is Symmetry.PERMUTATION
    assert region.width == 8
    assert region.keeps_apart is (forward is not pixels)
    assert not region.positive_scale
    expected = run(dense, x=x)
    for draw, good in ((random_admissible_map, True), (random_wrong_map, False)):
        graph = dense.copy()
        map_regions(graph, ("ffn",), draw)
        found = difference(run(graph, x=x), expected)
        assert found <= BOUND if good else not found < BROKEN  # of a negative variance there is no number


@pytest.mark.parametrize("forward", [as_image, along_the_rows, pixels, inverted], ids=lambda forward: forward.__name__)
def test_neurons_that_nothing_reads_are_left_out(trace: Any, run: Any, difference: Any, forward: Forward) -> None:
    """Then nothing changes but the width, in every parameter and in what states it."""
    x = FORWARDS[forward]
    graph = graph_of(trace, forward, x.shape)
    region = ffn_of(graph)
    assert why_not_cut(graph, region) in ("", "it is not part of a block")  # the last linear writes the output
    (reader,) = (graph.op(name) for name in region.readers)
    weight = graph.weight(reader).clone()
    weight[:, [1, 4, 6]] = 0
    graph.set_weight(reader, weight)
    expected = run(graph, x=x)
    kept = selection(torch.tensor([0, 2, 3, 5, 7]), 8)
    insert = InsertMaps(region, RegionMap(kept, kept.T))
    insert(graph)
    FoldLinears(insert.downs, insert.ups)(graph)
    graph.refresh_shapes()
    assert difference(run(graph, x=x), expected) <= BOUND
    assert ffn_of(graph).width == 5
    assert all(8 not in value.shape for op in graph.ops for value in (*op.inputs, op.output))


def test_before_and_after(trace: Any, text: Any) -> None:
    graph = graph_of(trace, as_image, ROWS.shape)
    region = ffn_of(graph)
    kept = selection(torch.tensor([0, 2, 5]), 8)
    insert = InsertMaps(region, RegionMap(kept, kept.T))
    insert(graph)
    FoldLinears(insert.downs, insert.ups)(graph)
    assert (
        text(graph)
        == """\
linear_1: 3 = linear(x, up.weight[3,4], up.bias[3])
transpose_1: 6 = transpose(linear_1)
view_1: 3 = view(transpose_1)
channelwise_1: 3 = channelwise(view_1, depth.weight[3,1,3,3], depth.bias[3])
flatten_1: 6 = flatten(channelwise_1)
transpose_2: 3 = transpose(flatten_1)
gelu_1: 3 = gelu(transpose_2)
linear_2: 4 = linear(gelu_1, down.weight[4,3], down.bias[4])
add_1: 4 = add(x, linear_2)
return add_1"""
    )
    assert graph.op(region.readers[0]).inputs[0].width == 3
    assert dict(region.places)[region.tables[0]] == -4  # of a kernel (channels, 1, 3, 3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m, h: m.full(h), "goes into conv2d"),  # every channel reads all
        (lambda m, h: m.pairs(h), "goes into conv2d"),  # each two read each other
        (lambda m, h: m.twice(h)[:, ::2], "goes into conv2d"),  # each becomes two
        (lambda m, h: h.reshape(-1, 4, 4, 3).reshape(-1, 8, 2, 3), "goes into reshape"),  # halves of the channels
        (lambda m, h: m.rows(h), "acts on another of its axes"),
        (lambda m, h: h.cumsum(1), "cumsum"),
        (lambda m, h: h.index_select(1, torch.arange(8).flip(0)), "index_select"),
        (lambda m, h: h * m.table, "is used elsewhere too"),
    ],
)
def test_what_mixes_channels_is_refused(trace: Any, change: Any, reason: str) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        image = change(m, m.up(x).transpose(1, 2).view(-1, 8, 2, 3))
        return m.down(torch.relu(image.flatten(2).transpose(1, 2))) + m.table.sum()

    parts: dict[str, Any] = {"up": nn.Linear(4, 8), "down": nn.Linear(8, 4), "rows": nn.Linear(3, 3)}
    parts |= {"full": nn.Conv2d(8, 8, 3, padding=1), "pairs": nn.Conv2d(8, 8, 3, padding=1, groups=4)}
    parts |= {"twice": nn.Conv2d(8, 16, 3, padding=1, groups=8), "table": nn.Parameter(torch.empty(8, 1, 1))}
    report = find_regions(trace(forward, (2, 6, 4), **parts))
    assert not list(report.of_kind("ffn"))
    writer = next(row for row in report.linears if row.parameter == "up.weight")
    assert reason in writer.writes_reason


def test_a_gate_a_channel_off_the_last_axis_is_no_scale_of_rows(trace: Any) -> None:
    """(batch, channels, places) times (batch, channels, 1): rotations do not pass it, whatever a norm lets through."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.up(x).transpose(1, 2)
        return m.down((h * h.amax(2, keepdim=True)).transpose(1, 2))

    regions = list(find_regions(trace(forward, (2, 6, 4), up=nn.Linear(4, 8), down=nn.Linear(8, 4))).regions)
    assert not [region for region in regions if region.symmetry is not Symmetry.PERMUTATION]


def test_merging_is_no_part_of_what_keeps_neurons_apart(trace: Any) -> None:
    region = ffn_of(graph_of(trace, as_image, ROWS.shape))
    assert region.keeps_apart
    assert not replace(region, tables=(), limit="").keeps_apart
