"""FoldNormGains: a norm's gain and bias go into the linears behind it, or stand in front of a tied head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.fold_norm_gains import FoldNormGains
from dotresize_fx.passes.pass_base import PassContractError
from dotresize_fx.regions import Region

IDS = torch.tensor([[0, 5, 2], [6, 1, 3], [4, 4, 0]])
# Weights are multiplied in float64 and rounded to float32 once.
ROUNDING = 1e-6


def decoder(m: Any, ids: torch.Tensor) -> torch.Tensor:
    stream = m.table(ids)
    stream = stream + m.down(torch.relu(m.up(m.norm(stream))))
    return m.head(m.final(stream))


def parts(norm: Callable[[], nn.Module], *, tied: bool) -> dict[str, nn.Module]:
    table, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    if tied:
        head.weight = table.weight
    ends = {"norm": norm(), "final": norm(), "table": table, "head": head}
    return {**ends, "up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}


def stream_of(graph: FxGraph) -> Region:
    (region,) = find_regions(graph).of_kind("residual")
    return region


def rms() -> nn.Module:
    return nn.RMSNorm(4, eps=1e-6)


def layer() -> nn.Module:
    return nn.LayerNorm(4)


def test_before_and_after(trace: Callable[..., FxGraph], text: Callable[[FxGraph], str]) -> None:
    graph = trace(decoder, (2, 3), dtype=torch.int64, **parts(layer, tied=True))
    assert (
        text(graph)
        == """\
embedding_1: 4 = embedding(ids, head.weight[7,4])
layer_norm_1: 4 = layer_norm(embedding_1, norm.weight[4], norm.bias[4], eps=1e-05)
linear_1: 8 = linear(layer_norm_1, up.weight[8,4], up.bias[8])
relu_1: 8 = relu(linear_1)
linear_2: 4 = linear(relu_1, down.weight[4,8], down.bias[4])
add_1: 4 = add(embedding_1, linear_2)
layer_norm_2: 4 = layer_norm(add_1, final.weight[4], final.bias[4], eps=1e-05)
linear_3: 7 = linear(layer_norm_2, head.weight[7,4])
return linear_3"""
    )
    assert FoldNormGains(stream_of(graph))(graph).records == (
        "layer_norm: gain folded into 1 readers",
        "layer_norm_1: gain folded into 0 readers; kept in front of linear_2, whose weight is tied",
    )
    assert (
        text(graph)
        == """\
embedding_1: 4 = embedding(ids, head.weight[7,4])
layer_norm_1: 4 = layer_norm(embedding_1, eps=1e-05)
linear_1: 8 = linear(layer_norm_1, up.weight[8,4], up.bias[8])
relu_1: 8 = relu(linear_1)
linear_2: 4 = linear(relu_1, down.weight[4,8], down.bias[4])
add_1: 4 = add(embedding_1, linear_2)
layer_norm_2: 4 = layer_norm(add_1, eps=1e-05)
linear_3: 4 = linear(layer_norm_2, linear_2_gain.weight[4,4], linear_2_gain.bias[4])
linear_4: 7 = linear(linear_3, head.weight[7,4])
return linear_4"""
    )


@pytest.mark.parametrize("norm", [rms, layer])
@pytest.mark.parametrize("tied", [False, True])
def test_parity(
    trace: Callable[..., FxGraph],
    run: Callable[..., list[torch.Tensor]],
    difference: Callable[..., float],
    norm: Callable[[], nn.Module],
    tied: bool,
) -> None:
    graph = trace(decoder, (2, 3), dtype=torch.int64, **parts(norm, tied=tied))
    before = run(graph, ids=IDS)
    FoldNormGains(stream_of(graph))(graph)
    assert difference(run(graph, ids=IDS), before) <= ROUNDING
    assert not any(op.weight for op in graph.ops if op.kind in (Kind.RMS_NORM, Kind.LAYER_NORM))


def test_an_untied_head_without_bias_gets_one(trace: Callable[..., FxGraph]) -> None:
    graph = trace(decoder, (2, 3), dtype=torch.int64, **parts(layer, tied=False))
    FoldNormGains(stream_of(graph))(graph)
    head = [op for op in graph.ops if op.kind is Kind.LINEAR][-1]
    assert head.bias is not None
    assert graph.parameter_name(head.bias) == "head.bias"


def test_behind_a_scale(
    trace: Callable[..., FxGraph], run: Callable[..., list[torch.Tensor]], difference: Callable[..., float]
) -> None:
    """Some models scale the last norm's output before the head: the bias is scaled there too."""

    def scaled(m: Any, ids: torch.Tensor) -> torch.Tensor:
        return m.head(m.final(m.table(ids) + m.down(m.norm(m.table(ids)) * 3)) * 0.25)

    for tied in (False, True):
        chosen = parts(layer, tied=tied)
        chosen["down"] = nn.Linear(4, 4)
        graph = trace(scaled, (2, 3), dtype=torch.int64, **chosen)
        before = run(graph, ids=IDS)
        FoldNormGains(stream_of(graph))(graph)
        assert difference(run(graph, ids=IDS), before) <= ROUNDING


def test_norms_without_gain_are_left_alone(trace: Callable[..., FxGraph], text: Callable[[FxGraph], str]) -> None:
    graph = trace(
        decoder, (2, 3), dtype=torch.int64, **parts(lambda: nn.LayerNorm(4, elementwise_affine=False), tied=True)
    )
    before = text(graph)
    assert not FoldNormGains(stream_of(graph))(graph).modified
    assert text(graph) == before


def test_a_norm_that_something_else_reads_is_refused(trace: Callable[..., FxGraph]) -> None:
    """find_regions gives no such region; a hand-made one must not pass silently."""
    graph = trace(lambda m, x: m.up(torch.tanh(m.norm(x))), (2, 4), norm=rms(), up=nn.Linear(4, 8))
    norm = graph.ops[0].name
    region = Region("made up", "residual", "orthogonal", 4, (), ("linear",), (norm,), ("linear",))  # type: ignore[arg-type]
    with pytest.raises(PassContractError, match="tanh between a norm and its readers"):
        FoldNormGains(region)(graph)
