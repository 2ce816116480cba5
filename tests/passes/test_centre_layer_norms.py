"""CentreLayerNorms: when every writer is centred, LayerNorm is RMSNorm (SliceGPT, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.passes.centre_layer_norms import CentreLayerNorms
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.fold_norm_gains import FoldNormGains
from dotresize_fx.passes.pass_base import PassContractError
from dotresize_fx.regions import Region

IDS = torch.tensor([[0, 5, 2], [6, 1, 3], [4, 4, 0]])
# The mean goes in float64, weights are rounded to float32 once; the subtraction the norm did is not done any more.
ROUNDING = 1e-6


def decoder(m: Any, ids: torch.Tensor) -> torch.Tensor:
    stream = m.table(ids) + m.positions(torch.arange(3))
    stream = stream + m.down(torch.relu(m.up(m.norm(stream))))
    return m.head(m.final(stream))


def parts(*, tied: bool, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> dict[str, nn.Module]:
    table, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    if tied:
        head.weight = table.weight
    ends = {"norm": norm(4), "final": norm(4), "table": table, "positions": nn.Embedding(3, 4), "head": head}
    return {**ends, "up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}


def stream_of(graph: FxGraph) -> Region:
    (region,) = find_regions(graph).of_kind("residual")
    return region


def without_gains(trace: Callable[..., FxGraph], *, tied: bool) -> FxGraph:
    graph = trace(decoder, (2, 3), dtype=torch.int64, **parts(tied=tied))
    FoldNormGains(stream_of(graph))(graph)
    return graph


def test_before_and_after(trace: Callable[..., FxGraph], text: Callable[[FxGraph], str]) -> None:
    graph = without_gains(trace, tied=True)
    assert (
        text(graph)
        == """\
embedding_1: 4 = embedding(ids, head.weight[7,4])
arange_1: 3 = arange()
embedding_2: 4 = embedding(arange_1, positions.weight[3,4])
add_1: 4 = add(embedding_1, embedding_2)
layer_norm_1: 4 = layer_norm(add_1, eps=1e-05)
linear_1: 8 = linear(layer_norm_1, up.weight[8,4], up.bias[8])
relu_1: 8 = relu(linear_1)
linear_2: 4 = linear(relu_1, down.weight[4,8], down.bias[4])
add_2: 4 = add(add_1, linear_2)
layer_norm_2: 4 = layer_norm(add_2, eps=1e-05)
linear_3: 4 = linear(layer_norm_2, linear_2_gain.weight[4,4], linear_2_gain.bias[4])
linear_4: 7 = linear(linear_3, head.weight[7,4])
return linear_4"""
    )
    assert CentreLayerNorms(stream_of(graph))(graph).modified
    assert (
        text(graph)
        == """\
embedding_1: 4 = embedding(ids, head.weight[7,4])
linear_1: 4 = linear(embedding_1, embedding_centred.weight[4,4])
arange_1: 3 = arange()
embedding_2: 4 = embedding(arange_1, positions.weight[3,4])
add_1: 4 = add(linear_1, embedding_2)
rms_norm_1: 4 = rms_norm(add_1, eps=1e-05)
linear_2: 8 = linear(rms_norm_1, up.weight[8,4], up.bias[8])
relu_1: 8 = relu(linear_2)
linear_3: 4 = linear(relu_1, down.weight[4,8], down.bias[4])
add_2: 4 = add(add_1, linear_3)
rms_norm_2: 4 = rms_norm(add_2, eps=1e-05)
linear_4: 4 = linear(rms_norm_2, linear_2_gain.weight[4,4], linear_2_gain.bias[4])
linear_5: 7 = linear(linear_4, head.weight[7,4])
return linear_5"""
    )


@pytest.mark.parametrize("tied", [False, True])
def test_parity(
    trace: Callable[..., FxGraph],
    run: Callable[..., list[torch.Tensor]],
    difference: Callable[..., float],
    tied: bool,
) -> None:
    graph = without_gains(trace, tied=tied)
    before = run(graph, ids=IDS)
    CentreLayerNorms(stream_of(graph))(graph)
    assert difference(run(graph, ids=IDS), before) <= ROUNDING


def test_turning_the_norms_without_centring_would_show(
    trace: Callable[..., FxGraph], run: Callable[..., list[torch.Tensor]], difference: Callable[..., float]
) -> None:
    graph = without_gains(trace, tied=False)
    before = run(graph, ids=IDS)
    for op in [op for op in graph.ops if op.kind is Kind.LAYER_NORM]:
        graph.make_rms_norm(op)
    assert difference(run(graph, ids=IDS), before) > 100 * ROUNDING


def test_every_writer_is_centred(trace: Callable[..., FxGraph]) -> None:
    graph = without_gains(trace, tied=False)
    region = stream_of(graph)
    CentreLayerNorms(region)(graph)
    for op in (graph.op(name) for name in region.writers):
        mean = graph.weight(op).double().mean(0 if op.kind is Kind.LINEAR else 1)
        # Four float32 numbers below 2 that should sum to zero, each rounded once.
        assert mean.abs().max() <= 1e-6
        bias = graph.bias(op)
        assert bias is None or float(bias.double().mean().abs()) <= 1e-6


def test_a_gain_is_refused(trace: Callable[..., FxGraph]) -> None:
    graph = trace(decoder, (2, 3), dtype=torch.int64, **parts(tied=False))
    with pytest.raises(PassContractError, match="has a gain: fold it first"):
        CentreLayerNorms(stream_of(graph))(graph)


def test_a_reader_that_sees_the_mean_is_refused(trace: Callable[..., FxGraph]) -> None:
    graph = without_gains(trace, tied=False)
    region = stream_of(graph)
    with pytest.raises(PassContractError, match="would miss its mean"):
        CentreLayerNorms(replace(region, normed_readers=region.normed_readers[1:]))(graph)


def test_layer_norms_and_rms_norms_on_one_stream_are_refused(trace: Callable[..., FxGraph]) -> None:
    mixed = {**parts(tied=False), "final": nn.RMSNorm(4)}
    graph = trace(decoder, (2, 3), dtype=torch.int64, **mixed)
    FoldNormGains(stream_of(graph))(graph)
    with pytest.raises(PassContractError, match="on one stream"):
        CentreLayerNorms(stream_of(graph))(graph)


def test_rms_norms_need_nothing(trace: Callable[..., FxGraph], text: Callable[[FxGraph], str]) -> None:
    graph = trace(decoder, (2, 3), dtype=torch.int64, **parts(tied=True, norm=nn.RMSNorm))
    FoldNormGains(stream_of(graph))(graph)
    before = text(graph)
    assert not CentreLayerNorms(stream_of(graph))(graph).modified
    assert text(graph) == before
