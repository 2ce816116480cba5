"""close_channels: what lets only other orders of a width's numbers through, norms with their gains above all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.choose_regions import why_not_cut
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.insert_maps import InsertMaps
from dotresize_fx.passes.prove_exactness import BOUND, BROKEN, map_regions
from dotresize_fx.region_map import RegionMap, random_admissible_map, random_wrong_map, selection
from dotresize_fx.regions import Symmetry

Forward = Callable[..., torch.Tensor]
IDS = torch.tensor([[0.0, 5, 2, 1], [6, 1, 3, 1], [4, 4, 0, 2]])


def post_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    stream = m.norm(m.first(x) + m.table[None, 1])
    stream = m.other(stream + m.down(torch.relu(m.up(stream))))
    return m.head(stream)


def gain_on_the_skip(m: Any, x: torch.Tensor) -> torch.Tensor:
    stream = m.first(x)
    stream = stream * m.gain + m.down(torch.relu(m.up(m.norm(stream))))
    return m.head(m.other(stream))


def norm_by_hand(m: Any, x: torch.Tensor) -> torch.Tensor:
    stream = m.first(x)
    stream = stream + m.down(torch.relu(m.up(stream)))
    stream = stream - stream.mean(-1, keepdim=True)
    return m.head(stream / stream.abs().mean(-1, keepdim=True) * m.gain)


def head_behind_a_transform(m: Any, x: torch.Tensor) -> torch.Tensor:
    stream = m.first(x)
    stream = stream + m.down(torch.relu(m.up(m.norm(stream))))
    return m.head(m.other(torch.relu(m.square(stream)))) + m.head(m.norm(stream))


def bare_reader(m: Any, x: torch.Tensor) -> torch.Tensor:
    stream = m.first(x)
    stream = stream + m.down(torch.relu(m.up(stream)))
    return m.head(m.norm(stream))


def graph_of(trace: Callable[..., FxGraph], forward: Forward) -> FxGraph:
    sizes = {"first": (4, 8), "up": (8, 16), "down": (16, 8), "head": (8, 3), "square": (8, 8)}
    parts: dict[str, Any] = {name: nn.Linear(*size) for name, size in sizes.items()}
    parts |= {"gain": nn.Parameter(torch.empty(8)), "table": nn.Parameter(torch.empty(3, 8))}
    return trace(forward, (3, 4), **parts, norm=nn.LayerNorm(8), other=nn.LayerNorm(8))


FORWARDS: dict[Forward, str] = {
    post_norm: "post-norm",
    gain_on_the_skip: "a parameter is multiplied",
    norm_by_hand: "a mean is taken",
    head_behind_a_transform: "a nonlinearity and a norm",
    bare_reader: "reads it without a norm",
}


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_other_orders_pass_and_rotations_do_not(trace: Any, run: Any, difference: Any, forward: Forward) -> None:
    (stream,) = find_regions(graph_of(trace, forward)).of_kind("residual")
    assert stream.symmetry is Symmetry.PERMUTATION
    assert FORWARDS[forward] in stream.limit
    expected = run(graph_of(trace, forward), x=IDS)
    for draw, good in ((random_admissible_map, True), (random_wrong_map, False)):
        graph = graph_of(trace, forward)
        assert map_regions(graph, ("residual",), draw) == 1
        found = difference(run(graph, x=IDS), expected)
        assert found <= BOUND if good else found >= BROKEN


def test_gains_and_tables_are_mapped_where_they_are(trace: Any, text: Any) -> None:
    graph = graph_of(trace, post_norm)
    (stream,) = find_regions(graph).of_kind("residual")
    before = text(graph)
    last_first = selection(torch.arange(7, -1, -1), 8)
    gains = [graph.weight(graph.op(name)).clone() for name in stream.norms]
    insert = InsertMaps(stream, RegionMap(last_first, last_first.T))
    insert(graph)
    assert (
        text(graph)
        == """\
linear_1: 8 = linear(x, first.weight[8,4], first.bias[8])
linear_2: 8 = linear(linear_1, inserted_down.weight[8,8])
unsqueeze_1: 8 = unsqueeze(table[3,8])
select_1: 8 = select(unsqueeze_1)
add_1: 8 = add(linear_2, select_1)
layer_norm_1: 8 = layer_norm(add_1, norm.weight[8], norm.bias[8], eps=1e-05)
linear_3: 8 = linear(layer_norm_1, inserted_up.weight[8,8])
linear_4: 16 = linear(linear_3, up.weight[16,8], up.bias[16])
relu_1: 16 = relu(linear_4)
linear_5: 8 = linear(relu_1, down.weight[8,16], down.bias[8])
linear_6: 8 = linear(linear_5, inserted_down.weight_1[8,8])
add_2: 8 = add(layer_norm_1, linear_6)
layer_norm_2: 8 = layer_norm(add_2, other.weight[8], other.bias[8], eps=1e-05)
linear_7: 8 = linear(layer_norm_2, inserted_up.weight_1[8,8])
linear_8: 3 = linear(linear_7, head.weight[3,8], head.bias[3])
return linear_8"""
    )
    assert "inserted" not in before
    mapped = [graph.weight(graph.op(name)) for name in stream.norms]
    assert all(torch.equal(new, old.flip(0)) for new, old in zip(mapped, gains, strict=True))


def test_such_a_stream_is_not_cut(trace: Any) -> None:
    graph = graph_of(trace, post_norm)
    (stream,) = find_regions(graph).of_kind("residual")
    assert why_not_cut(graph, stream).endswith("leaving channels out is not supported there yet")


def test_an_ffn_with_a_norm_inside_is_not_cut(trace: Any) -> None:
    graph = graph_of(trace, lambda m, x: m.head(m.norm(torch.relu(m.first(x)))))
    (ffn,) = find_regions(graph).of_kind("ffn")
    assert not ffn.positive_scale  # a norm undoes no scale of one number
    assert "mean square would change" in why_not_cut(graph, ffn)


def test_a_response_norm_inside_an_ffn_is_no_stream(trace: Any, run: Any, difference: Any) -> None:
    """ConvNeXt V2: its norm is over the other axes, its mean over the width, and it adds what it read."""

    def response(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(m.first(x))
        size = torch.linalg.vector_norm(h, 2, (0,), True)
        return m.head(m.gain * (h * (size / (size.mean(-1, keepdim=True) + 1e-6))) + m.table[:1] + h)

    (ffn,) = find_regions(graph_of(trace, response)).of_kind("ffn", "residual")
    assert ffn.kind == "ffn"
    expected = run(graph_of(trace, response), x=IDS)
    for draw, good in ((random_admissible_map, True), (random_wrong_map, False)):
        graph = graph_of(trace, response)
        map_regions(graph, ("ffn",), draw)
        found = difference(run(graph, x=IDS), expected)
        assert found <= BOUND if good else found >= BROKEN


@pytest.mark.parametrize("deviation", [torch.std, torch.var])
def test_what_stands_out_of_a_width_is_proved_and_not_cut(
    trace: Any, run: Any, difference: Any, deviation: Any
) -> None:
    """Gemma 3n: of a gate what lies so many deviations above the mean passes, in whatever order."""

    def top(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.first(x)
        least = h.mean(-1, keepdim=True) + 0.3 * deviation(h, dim=-1, keepdim=True, unbiased=False)
        return m.head(torch.relu(h - least))

    graph = graph_of(trace, top)
    (ffn,) = find_regions(graph).of_kind("ffn", "residual")
    assert not ffn.positive_scale
    assert why_not_cut(graph, ffn) == "a mean or deviation is taken over it, which would change"
    expected = run(graph, x=IDS)
    for draw, good in ((random_admissible_map, True), (random_wrong_map, False)):
        graph = graph_of(trace, top)
        map_regions(graph, ("ffn",), draw)
        found = difference(run(graph, x=IDS), expected)
        assert found <= BOUND if good else found >= BROKEN


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.head(torch.relu(s := m.first(x)) * s.std(-1, keepdim=True) + s.cumsum(-1)), "cumsum"),
        (lambda m, x: (s := m.norm(m.first(x)), m.head(m.norm(s + m.square(s)))), "it is an output of the graph"),
        (lambda m, x: m.head(m.norm(s := m.first(x)) + s.cumsum(-1)), "cumsum"),
        (lambda m, x: m.head(m.norm(s := m.first(x)) + s * m.gain) + m.gain.sum(), "is used elsewhere too"),
    ],
)
def test_what_knows_the_order_is_refused(trace: Any, forward: Forward, reason: str) -> None:
    report = find_regions(graph_of(trace, forward))
    assert not list(report.of_kind("residual", "ffn"))
    writer = next(row for row in report.linears if row.parameter == "first.weight")
    assert reason in writer.writes_reason
