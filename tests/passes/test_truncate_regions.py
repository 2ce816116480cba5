"""Models of planned widths without solving: each is the dense model with the last rows of its regions left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.truncate_regions import truncate_regions
from dotresize_fx.regions import Region, RegionKind

Run = Callable[..., list[torch.Tensor]]
# The same sums with other terms of zero.
ROUNDING = 1e-5


def without_last(graph: FxGraph, region: Region, narrow: int) -> FxGraph:
    """The dense graph in which what narrowing leaves out is zero where it is written; rotary pairs are halves."""
    pairs = torch.arange(region.width).view(2, -1)[:, narrow // 2 :].reshape(-1)
    gone = pairs if region.kind is RegionKind.QUERY_KEY else torch.arange(narrow, region.width)
    graph = graph.copy()
    for name in region.writers:
        op = graph.op(name)
        weight = graph.weight(op).clone()
        heads = weight.unflatten(0, (-1, region.width))
        heads[:, gone] = 0
        graph.set_weight(op, weight)
    return graph


@pytest.mark.parametrize("kind", ["ffn", "value", "query_key"])
def test_what_is_left_out_is_what_would_be_zero(
    tiny_graph: Callable[[str], tuple[Any, FxGraph]],
    tiny_batch: Callable[..., Mapping[str, torch.Tensor]],
    run: Run,
    difference: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], float],
    kind: str,
) -> None:
    dense = tiny_graph("llama")[1]
    region = next(find_regions(dense).of_kind(kind))
    narrow = region.width // 2
    slim = truncate_regions(dense, [region], {region.name: narrow})
    batch = tiny_batch(2, 12)
    zeroed = without_last(dense, region, narrow)
    assert difference(run(slim, **batch), run(zeroed, **batch)) <= ROUNDING
    assert difference(run(slim, **batch), run(dense, **batch)) > 100 * ROUNDING
    found = {other.name: other.width for other in find_regions(slim).regions}
    assert found[region.name] == narrow


def test_all_widths_of_a_plan_at_once(
    tiny_graph: Callable[[str], tuple[Any, FxGraph]],
    tiny_batch: Callable[..., Mapping[str, torch.Tensor]],
    run: Run,
) -> None:
    dense = tiny_graph("llama")[1]
    regions = list(find_regions(dense).of_kind("ffn", "value", "query_key"))
    widths = {region.name: region.width // 2 for region in regions}
    slim = truncate_regions(dense, regions, widths)
    assert {r.name: r.width for r in find_regions(slim).of_kind("ffn", "value", "query_key")} == widths
    assert run(slim, **tiny_batch(2, 12))[0].isfinite().all()
    whole = truncate_regions(dense, regions, {})
    assert torch.equal(run(whole, **tiny_batch(2, 12))[0], run(dense, **tiny_batch(2, 12))[0])
