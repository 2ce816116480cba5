"""JoinExpertLists: experts that a loop goes through are one product of rows with each expert's own matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.integrations.moe  # registers the product of routed rows
from torch import nn

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.join_expert_lists import JoinExpertLists
from dotresize_fx.passes.prove_exactness import BOUND, BROKEN, map_regions, redraw_parameters
from dotresize_fx.region_map import random_admissible_map, random_wrong_map
from dotresize_fx.regions import RegionKind

assert transformers.integrations.moe
ROUNDING = 1e-6  # the same products, perhaps added up in another order
EXPERTS, WIDTH, HIDDEN = 3, 6, 4


class Experts(nn.Module):
    """JetMoE's spelling: rows of experts that a token's number says, split by how many each has."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2)) -> None:
        super().__init__()
        self.order = order
        self.up = nn.Parameter(torch.empty(EXPERTS, HIDDEN, WIDTH))
        self.down = nn.Parameter(torch.empty(EXPERTS, WIDTH, HIDDEN))

    def forward(self, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        counts = nn.functional.one_hot(expert, EXPERTS).sum(0)
        sizes = counts.tolist()
        hidden = torch.relu(self._through(x, self.up, sizes))
        return self._through(hidden, self.down, sizes) + 0

    def _through(self, rows: torch.Tensor, weight: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        parts = rows.split(sizes, dim=0)
        return torch.cat([nn.functional.linear(parts[i], weight[j]) for i, j in enumerate(self.order)])


def traced(order: tuple[int, ...] = (0, 1, 2)) -> FxGraph:
    module = redraw_parameters(Experts(order).eval())
    rows = torch.export.Dim("rows", min=2, max=64)
    inputs = (torch.ones(8, WIDTH), torch.tensor([0, 0, 1, 1, 1, 2, 2, 2]))
    return FxGraph(torch.export.export(module, inputs, dynamic_shapes=({0: rows}, {0: rows})))


@pytest.fixture(params=[[0, 0, 0, 1, 2, 2], [1] * 5])
def inputs(request: Any) -> dict[str, torch.Tensor]:
    """Rows in the order of their experts, some of which have none."""
    expert = torch.tensor(request.param)
    return {"x": torch.randn(len(expert), WIDTH, generator=torch.Generator().manual_seed(0)), "expert": expert}


def test_before_and_after(run: Any, difference: Any, inputs: Any) -> None:
    graph = traced()
    before = run(graph, **inputs)
    assert not any(op.is_linear for op in graph.ops)
    assert JoinExpertLists()(graph).records == tuple(f"{name}: experts seen as one product" for name in ("up", "down"))
    ops = [op for op in graph.ops if op.kind in (Kind.EXPERTS, Kind.POINTWISE)]
    assert [op.function or str(op.kind) for op in ops] == ["experts", "relu", "experts"]
    assert ops[0].inputs[1] == ops[2].inputs[1]  # where rows end is told once
    assert not any(op.spelling.startswith(("split", "item", "cat")) for op in graph.ops)
    assert difference(run(graph, **inputs), before) <= ROUNDING


def test_the_experts_are_a_region_and_proved(run: Any, difference: Any, inputs: Any) -> None:
    graph = traced()
    before = run(graph, **inputs)
    JoinExpertLists()(graph)
    (region,) = find_regions(graph).regions
    assert (region.kind, region.width, region.heads) == (RegionKind.EXPERTS, HIDDEN, EXPERTS)
    wrong = graph.copy()
    map_regions(graph, (RegionKind.EXPERTS,), random_admissible_map)
    assert difference(run(graph, **inputs), before) <= BOUND
    map_regions(wrong, (RegionKind.EXPERTS,), random_wrong_map)
    assert difference(run(wrong, **inputs), before) >= BROKEN


def test_another_expert_than_the_rows_are_of_stays() -> None:
    graph = traced((0, 2, 1))
    assert JoinExpertLists()(graph).records == ()
