"""Experts in the sweep: cut by what each saw, repaired, and planned beside the other widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.options import Options
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.passes.sweep_regions import Slimmed
from dotresize_fx.progress import Progress
from dotresize_fx.regions import RegionKind

EXPERTS = (RegionKind.EXPERTS,)


@pytest.fixture(scope="module")
def graph(tiny_graph: Any) -> FxGraph:
    found: FxGraph = tiny_graph("mixtral")[1]
    return found


@pytest.fixture(scope="module")
def batches(tiny_batch: Any) -> list[Any]:
    return [tiny_batch(4, 48, padding=9, seed=seed) for seed in range(9)]


def slimmed(graph: FxGraph, batches: Any, **chosen: Any) -> Slimmed:
    options = Options(regions=("ffn",), **{"ratio": 0.3, **chosen})
    return slim_graph(graph, find_regions(graph), batches, options, Progress(quiet=True))


def error(graph: FxGraph, slim: FxGraph, batch: Any) -> float:
    wanted, found = (Execution(one).outputs(batch)[0][batch["attention_mask"].bool()] for one in (graph, slim))
    return float((found - wanted).square().sum() / wanted.square().sum())


def test_all_experts_of_a_layer_get_one_width(graph: FxGraph, batches: Any) -> None:
    result = slimmed(graph, batches)
    assert [one.region.kind for one in result.swept] == [RegionKind.EXPERTS] * 2
    for one in result.swept:
        assert one.error is not None
        shapes = [tuple(result.graph.weight(result.graph.op(name)).shape) for name in one.region.writers]
        assert shapes == [(4, one.width, 32)] * 2
    assert not any(op.name.startswith("inserted") for op in result.graph.ops)


def test_elimination_and_refit_lose_less_than_dropping(graph: FxGraph, batches: Any, tiny_batch: Any) -> None:
    held_out = tiny_batch(4, 48, seed=99)
    ours = error(graph, slimmed(graph, batches, allocation="uniform").graph, held_out)
    dropped = error(graph, slimmed(graph, batches, allocation="uniform", method="magnitude").graph, held_out)
    assert 0 < ours < 0.9 * dropped


def test_repair_makes_it_better(graph: FxGraph, batches: Any, tiny_batch: Any) -> None:
    held_out = tiny_batch(4, 48, seed=99)
    fast = slimmed(graph, batches, allocation="uniform")
    best = slimmed(graph, batches, allocation="uniform", effort="best", repair_steps=60)
    assert error(graph, best.graph, held_out) < error(graph, fast.graph, held_out)
    for one in best.swept:
        assert one.notes["loss after repair"] <= one.notes["loss before repair"]  # type: ignore[operator]


def test_padding_does_not_count(graph: FxGraph, tiny_batch: Any) -> None:
    """Other ids under the mask, the same model: those rows are no one's."""
    given = [tiny_batch(4, 48, padding=20, seed=seed) for seed in range(4)]
    other = []
    for batch in given:
        ids = torch.where(batch["attention_mask"].bool(), batch["input_ids"], (batch["input_ids"] + 7) % 97)
        other.append({**batch, "input_ids": ids})
    first, second = (slimmed(graph, batches, allocation="uniform").graph for batches in (given, other))
    for op in first.ops:
        if op.kind is Kind.EXPERTS:
            # Attention over hidden positions is not, to the bit, no attention: float32 rounding.
            torch.testing.assert_close(first.weight(op), second.weight(second.op(op.name)), rtol=1e-3, atol=1e-4)


def test_an_expert_that_saw_nothing_is_said(graph: FxGraph, tiny_batch: Any) -> None:
    result = slimmed(graph, [tiny_batch(1, 8)], allocation="uniform")
    assert all("fewer tokens" in note for one in result.swept for note in one.notes)
