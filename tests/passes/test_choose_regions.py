"""Which regions are taken, in which order, and in what words the rest is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.passes.choose_regions import SWEPT, choose_regions, sublayers, why_not_cut
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.regions import RegionKind

IN_ORDER = ["kv_heads", "query_key", "value", "ffn"]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "bert"])
def test_sublayer_by_sublayer_scores_before_values(tiny_graph: Any, kind: str) -> None:
    _, graph = tiny_graph(kind)
    chosen, left = choose_regions(graph, find_regions(graph).regions[::-1], SWEPT)
    assert left == ()
    assert [str(region.kind) for region in chosen] == IN_ORDER * 2
    groups = sublayers(chosen)
    assert [len(group) for group in groups] == [3, 1, 3, 1]
    assert all(len({region.target for region in group}) == 1 for group in groups)
    targets = [graph.positions[group[0].target] for group in groups]
    assert targets == sorted(targets)


def test_attention_and_ffn_in_parallel_are_one_sublayer(tiny_graph: Any) -> None:
    _, graph = tiny_graph("phi")
    chosen, left = choose_regions(graph, find_regions(graph).regions, SWEPT)
    assert left == ()
    kinds = [[str(region.kind) for region in group] for group in sublayers(chosen)]
    assert kinds == [["kv_heads", "value", "ffn"]] * 2


def test_only_the_kinds_asked_for(tiny_graph: Any) -> None:
    _, graph = tiny_graph("llama")
    found = find_regions(graph).regions
    assert {region.kind for region in choose_regions(graph, found, [RegionKind.VALUE])[0]} == {RegionKind.VALUE}
    assert choose_regions(graph, found, []) == ([], ())


def ffn(m: Any, number: int, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = getattr(m, f"down{number}")(torch.relu(getattr(m, f"up{number}")(x)))
    return found


def parts(count: int) -> dict[str, nn.Module]:
    ups = {f"up{i}": nn.Linear(8, 32) for i in range(count)}
    return {"head": nn.Linear(8, 3), **ups, **{f"down{i}": nn.Linear(32, 8) for i in range(count)}}


def test_what_runs_beside_a_sublayer_and_adds_later_is_left_alone(trace: Any) -> None:
    """The third FFN reads what the first does, and adds to the sum behind the second."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        beside = ffn(m, 2, x)
        y = x + ffn(m, 0, x)
        return m.head(torch.relu(y + ffn(m, 1, y) + beside))  # type: ignore[no-any-return]

    graph = trace(forward, (2, 8), **parts(3))
    chosen, left = choose_regions(graph, find_regions(graph).regions, SWEPT)
    assert [graph.parameter_name(graph.op(region.writers[0]).weight) for region in chosen] == ["up0.weight"]
    assert len(left) == 2
    assert all(f"left alone, it runs beside {chosen[0].name} and adds to a later sum" in note for note in left)


def test_weights_that_two_layers_share(trace: Any) -> None:
    graph = trace(lambda m, x: m.head(ffn(m, 0, ffn(m, 0, x))), (2, 8), **parts(1))
    with pytest.raises(NothingToSlimError, match=r"none of the 1 FFN widths found can be cut: .* shared by several"):
        choose_regions(graph, find_regions(graph).regions, SWEPT)


def test_reasons(trace: Any, tiny_graph: Any) -> None:
    plain = trace(lambda m, x: torch.relu(m.down0(m.up0(x))), (2, 8), **parts(1))
    (region,) = find_regions(plain).of_kind("plain")
    assert "not supported yet" in why_not_cut(plain, region)

    graph = tiny_graph("llama")[1]
    assert [why_not_cut(graph, region) for region in find_regions(graph).regions] == [""] * 9
