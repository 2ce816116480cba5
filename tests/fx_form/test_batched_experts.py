"""Experts that all see all rows, as batched products: each has a basis of its own while rows stay with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.options import Options
from dotresize_fx.passes.choose_regions import why_not_cut
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.prove_exactness import BOUND, BROKEN, map_regions
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.passes.split_packed_linears import SplitPackedLinears
from dotresize_fx.progress import Progress
from dotresize_fx.region_map import random_admissible_map, random_wrong_map
from dotresize_fx.regions import Region, RegionKind

EXPERTS, WIDTH, HIDDEN = 3, 6, 16
X = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(0))


def routed(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Llama 4's: rows repeated, scores multiplied in before the experts, 0 for what the router did not choose."""
    scores = torch.sigmoid(m.router(x)).T
    scores = torch.where(scores > 0.5, scores, torch.zeros_like(scores)).reshape(EXPERTS, -1, 1)
    return x.repeat(EXPERTS, 1).view(EXPERTS, -1, WIDTH) * scores


def gated(m: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = torch.bmm(routed(m, x), m.gate_up).chunk(2, -1)
    return m.head(x + torch.bmm(nn.functional.silu(gate) * up, m.down).sum(0))


def turned(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.relu(torch.bmm(routed(m, x), m.up.transpose(1, 2)))
    return m.head(x + torch.bmm(hidden, m.down).sum(0))


def passed_on_to_another(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.relu(torch.bmm(routed(m, x), m.up.transpose(1, 2)))
    return m.head(x + torch.bmm(hidden.index_select(0, m.router.bias.argsort()), m.down).sum(0))


@pytest.fixture
def made(trace: Any) -> Callable[[Any], FxGraph]:
    def make(forward: Any) -> FxGraph:
        parts: dict[str, Any] = {"router": nn.Linear(WIDTH, EXPERTS), "head": nn.Linear(WIDTH, 5)}
        parts["gate_up"] = nn.Parameter(torch.empty(EXPERTS, WIDTH, 2 * HIDDEN))
        parts["up"] = nn.Parameter(torch.empty(EXPERTS, HIDDEN, WIDTH))
        parts["down"] = nn.Parameter(torch.empty(EXPERTS, HIDDEN, WIDTH))
        graph: FxGraph = trace(forward, (4, WIDTH), **parts)
        SplitPackedLinears()(graph)
        return graph

    return make


def only_region(graph: FxGraph) -> Region:
    (region,) = find_regions(graph).of_kind(RegionKind.EXPERTS, RegionKind.FFN)
    return region


@pytest.mark.parametrize("forward", [gated, turned, passed_on_to_another])
def test_admissible_maps_change_nothing_and_wrong_ones_do(made: Any, run: Any, difference: Any, forward: Any) -> None:
    graph = made(forward)
    before = run(graph, x=X)
    for draw, good in ((random_admissible_map, True), (random_wrong_map, False)):
        mapped = graph.copy()
        assert map_regions(mapped, (RegionKind.EXPERTS, RegionKind.FFN), draw) == 1
        found = difference(run(mapped, x=X), before)
        assert found <= BOUND if good else found >= BROKEN


@pytest.mark.parametrize("forward", [gated, turned])
def test_each_expert_has_a_basis_of_its_own(made: Any, forward: Any) -> None:
    graph = made(forward)
    region = only_region(graph)
    assert (region.kind, region.width, region.heads) == (RegionKind.EXPERTS, HIDDEN, EXPERTS)
    assert bool(region.linear_branch) == (forward is gated)
    assert not why_not_cut(graph, region)
    products = [op for op in graph.ops if op.kind is Kind.EXPERTS]
    assert all(len(op.inputs) == 1 and graph.weight(op).shape[1] == op.output.width for op in products)


def test_rows_that_go_to_another_expert_share_one_basis(made: Any) -> None:
    graph = made(passed_on_to_another)
    region = only_region(graph)
    assert (region.kind, region.heads) == (RegionKind.FFN, 1)
    assert why_not_cut(graph, region) == "experts share it with a linear of all tokens, or their rows with each other"


@pytest.mark.parametrize("method", ["auto", "magnitude"])
@pytest.mark.parametrize("forward", [gated, turned])
def test_they_are_cut(made: Any, run: Any, forward: Any, method: str) -> None:
    graph = made(forward)
    batches = [{"x": torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(i))} for i in range(9)]
    options = Options(ratio=0.4, regions=("ffn",), method=method, allocation="uniform", multiple=1)
    result = slim_graph(graph, find_regions(graph), batches, options, Progress(quiet=True))
    (swept,) = result.swept
    assert swept.width < HIDDEN
    (found,), (wanted,) = run(result.graph, x=X), run(graph, x=X)
    assert {result.graph.weight(result.graph.op(name)).shape[1] for name in swept.region.writers} == {swept.width}
    assert found.isfinite().all()
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 1
