"""InsertMaps: a region's map stands in the graph as linears, everything between writers and readers is k wide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.insert_maps import InsertMaps
from dotresize_fx.passes.open_stream import open_stream
from dotresize_fx.passes.pass_base import PassContractError
from dotresize_fx.region_map import RegionMap, random_admissible_map, random_rotation, selection
from dotresize_fx.regions import Region

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
# Two more float32 products on the way: rounding only.
ROUNDING = 1e-6


def gated(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x))


def ffn(trace: Callable[..., FxGraph]) -> tuple[FxGraph, Region]:
    graph = trace(gated, (2, 4), gate=nn.Linear(4, 8), up=nn.Linear(4, 8), down=nn.Linear(8, 4))
    (region,) = find_regions(graph).of_kind("ffn")
    return graph, region


def normed(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.reader(m.norm(m.writer(x)).view(-1, 1, 8))


def stream(trace: Callable[..., FxGraph], norm: nn.Module | None = None) -> tuple[FxGraph, Region]:
    norm = norm or nn.RMSNorm(8, eps=0.1)
    graph = trace(normed, (2, 4), writer=nn.Linear(4, 8), norm=norm, reader=nn.Linear(8, 3))
    (region,) = find_regions(graph).of_kind("residual")
    return graph, region


def test_before_and_after(trace: Callable[..., FxGraph], text: Callable[[FxGraph], str]) -> None:
    graph, region = ffn(trace)
    assert (
        text(graph)
        == """\
linear_1: 8 = linear(x, gate.weight[8,4], gate.bias[8])
silu_1: 8 = silu(linear_1)
linear_2: 8 = linear(x, up.weight[8,4], up.bias[8])
mul_1: 8 = mul(silu_1, linear_2)
linear_3: 4 = linear(mul_1, down.weight[4,8], down.bias[4])
return linear_3"""
    )
    down = selection(torch.tensor([0, 2, 5]), 8)
    insert = InsertMaps(region, RegionMap(down, down.T))
    assert insert(graph).modified
    assert (
        text(graph)
        == """\
linear_1: 8 = linear(x, gate.weight[8,4], gate.bias[8])
linear_2: 3 = linear(linear_1, inserted_down.weight[3,8])
silu_1: 3 = silu(linear_2)
linear_3: 8 = linear(x, up.weight[8,4], up.bias[8])
linear_4: 3 = linear(linear_3, inserted_down.weight_1[3,8])
mul_1: 3 = mul(silu_1, linear_4)
linear_5: 8 = linear(mul_1, inserted_up.weight[8,3])
linear_6: 4 = linear(linear_5, down.weight[4,8], down.bias[4])
return linear_6"""
    )
    assert insert.downs == ["inserted_down", "inserted_down_1"]
    assert insert.ups == ["inserted_up"]


def test_a_selection_drops_what_it_does_not_take(
    trace: Callable[..., FxGraph], run: Callable[..., list[torch.Tensor]], difference: Callable[..., float]
) -> None:
    graph, region = ffn(trace)
    gate, up, down = (graph.op(name) for name in (*region.writers, *region.readers))
    hidden = F.silu(F.linear(X, graph.weight(gate), graph.bias(gate))) * F.linear(X, graph.weight(up), graph.bias(up))
    support = torch.tensor([0, 2, 5])
    expected = F.linear(hidden[:, support], graph.weight(down)[:, support], graph.bias(down))
    InsertMaps(region, RegionMap(selection(support, 8), selection(support, 8).T))(graph)
    assert difference(run(graph, x=X), [expected]) <= ROUNDING


def test_full_width_maps_change_nothing(
    trace: Callable[..., FxGraph], run: Callable[..., list[torch.Tensor]], difference: Callable[..., float]
) -> None:
    for graph, region in (ffn(trace), stream(trace)):
        if region.norms:
            region, _ = open_stream(graph, region)
        before = run(graph, x=X)
        InsertMaps(region, random_admissible_map(region, torch.Generator().manual_seed(1)))(graph)
        assert difference(run(graph, x=X), before) <= ROUNDING


def test_a_stream_that_lies_in_the_kept_span_loses_nothing(
    trace: Callable[..., FxGraph],
    text: Callable[[FxGraph], str],
    run: Callable[..., list[torch.Tensor]],
    difference: Callable[..., float],
) -> None:
    """The norm of k dimensions has its own epsilon and scale; with them it is the norm of n, exactly."""
    graph, region = stream(trace)
    region, _ = open_stream(graph, region)
    span = random_rotation(8, torch.Generator().manual_seed(1))[:, :5]
    writer = graph.op(region.writers[0])
    projected = (span @ span.T).float()
    graph.set_weight(writer, projected @ graph.weight(writer))
    graph.set_bias(graph.op(writer.name), projected @ graph.bias(writer))
    before = run(graph, x=X)
    InsertMaps(region, RegionMap(span, span.T))(graph)
    assert (
        text(graph)
        == """\
linear_1: 8 = linear(x, writer.weight[8,4], writer.bias[8])
linear_2: 5 = linear(linear_1, inserted_down.weight[5,8])
rms_norm_1: 5 = rms_norm(linear_2, eps=0.16)
view_1: 5 = view(rms_norm_1)
linear_3: 8 = linear(view_1, inserted_up.weight[8,5])
linear_4: 3 = linear(linear_3, reader.weight[3,8], reader.bias[3])
return linear_4"""
    )
    assert difference(run(graph, x=X), before) <= ROUNDING


def test_reader_weights_given_outright(
    trace: Callable[..., FxGraph], text: Callable[[FxGraph], str], run: Callable[..., list[torch.Tensor]]
) -> None:
    graph, region = ffn(trace)
    weight = torch.ones(4, 3, dtype=torch.float64)
    reader = region.readers[0]
    down = selection(torch.tensor([0, 2, 5]), 8)
    bias = torch.full((4,), 7.0, dtype=torch.float64)
    insert = InsertMaps(region, RegionMap(down, None, reader_weights={reader: weight}, reader_biases={reader: bias}))
    insert(graph)
    assert insert.ups == []
    assert text(graph).splitlines()[-2] == "linear_5: 4 = linear(mul_1, down.weight[4,3], down.bias[4])"
    assert graph.weight(graph.op(reader)).dtype is torch.float32
    assert torch.equal(graph.bias(graph.op(reader)), torch.full((4,), 7.0))
    assert torch.isfinite(run(graph, x=X)[0]).all()


def test_the_linear_branch_takes_its_own_map(trace: Callable[..., FxGraph]) -> None:
    graph, region = ffn(trace)
    insert = InsertMaps(region, random_admissible_map(region, torch.Generator().manual_seed(1)))
    insert(graph)
    gate, up = (graph.weight(graph.op(name)) for name in insert.downs)
    assert set(gate.unique().tolist()) == {0.0, 1.0}
    assert len(up.unique()) == 9


def test_a_map_of_another_width_is_refused(trace: Callable[..., FxGraph]) -> None:
    graph, region = ffn(trace)
    with pytest.raises(PassContractError, match="the map starts at 7, not 8"):
        InsertMaps(region, RegionMap(torch.eye(7, dtype=torch.float64)))(graph)


def test_a_gain_or_a_layer_norm_in_the_way_is_refused(trace: Callable[..., FxGraph]) -> None:
    graph, region = stream(trace)
    turn = RegionMap(torch.eye(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64))
    with pytest.raises(PassContractError, match="cannot cross a gain"):
        InsertMaps(region, turn)(graph)
    graph, region = stream(trace, nn.LayerNorm(8, elementwise_affine=False))
    with pytest.raises(PassContractError, match="centre the layer norm first"):
        InsertMaps(region, turn)(graph)


def test_no_way_up_is_refused(trace: Callable[..., FxGraph]) -> None:
    graph, region = ffn(trace)
    with pytest.raises(PassContractError, match="no way up to linear_2"):
        InsertMaps(region, RegionMap(torch.eye(8, dtype=torch.float64)))(graph)
