"""One budget for widths, ranks and depth: what goes adds up to it, and the mix is no worse than its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from dotresize_fx.cost import CostModel, count_cost
from dotresize_fx.depth.prices import price_drops
from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.export.capture import capture
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.mixed.frontier import METHODS
from dotresize_fx.options import Options
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.drop_layers import DropLayers
from dotresize_fx.passes.factorize_graph import factorable, factorize_graph
from dotresize_fx.passes.find_blocks import find_blocks
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.plan_mixed import MixedPlan, Offers
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.passes.sweep_regions import Slimmed
from dotresize_fx.prices import price_graph
from dotresize_fx.progress import Progress
from dotresize_fx.rank.curves import measure_rank_curves, probed_rank
from dotresize_fx.rank.rank_sweep import RankCut

Batch = Mapping[str, torch.Tensor]
QUIET = Progress(quiet=True)
BLOCKS = 4


@pytest.fixture(scope="module")
def batches(tiny_batch: Callable[..., Batch]) -> list[Batch]:
    return [tiny_batch(8, 24, seed=seed) for seed in range(16)]


@pytest.fixture(scope="module")
def dense(tiny_model: Callable[..., Any]) -> FxGraph:
    """Of four blocks one adds next to nothing, and another's feed-forward network is of low rank."""
    model = tiny_model("llama", layers=BLOCKS)
    layers = model.model.layers
    with torch.no_grad():
        for part in (layers[1].self_attn.o_proj, layers[1].mlp.down_proj):
            part.weight.mul_(0.01)
        for linear in (layers[2].mlp.gate_proj, layers[2].mlp.up_proj, layers[2].mlp.down_proj):
            u, s, v = torch.linalg.svd(linear.weight, full_matrices=False)
            linear.weight.copy_(u[:, :4] * s[:4] @ v[:4])
    found = capture(model).graph
    canonicalise(found)
    return found


def slimmed(dense: FxGraph, batches: list[Batch], ratio: float, *methods: str, **options: Any) -> Slimmed:
    given = Options(ratio=ratio, methods=methods, **options)
    return slim_graph(dense, find_regions(dense), batches, given, QUIET)


@pytest.fixture(scope="module")
def mixed(dense: FxGraph, batches: list[Batch]) -> Slimmed:
    return slimmed(dense, batches, 0.4, *METHODS, check=True)


def test_what_went_is_what_was_asked_for(dense: FxGraph, mixed: Slimmed) -> None:
    before, after = (count_cost(graph, 1).block_linear_weights for graph in (dense, mixed.graph))
    assert 0.4 <= 1 - after / before < 0.46  # the last cut may be a coarse one


def test_each_goes_where_it_loses_least(mixed: Slimmed) -> None:
    notes = "\n".join(mixed.notes)
    assert "1 of 4 blocks went, 25.0% of the block weights: 1" in notes
    assert "linears of a lower rank now" in notes
    assert len(find_blocks(mixed.graph)) == BLOCKS - 1


def test_the_mix_is_no_worse_than_its_parts(dense: FxGraph, batches: list[Batch], mixed: Slimmed) -> None:
    fresh = batches[7::8]
    found = price_graph(dense, mixed.graph, fresh, "decoder")
    for method in METHODS:
        part = slimmed(dense, batches, 0.4, method)
        assert found <= price_graph(dense, part.graph, fresh, "decoder") * 1.001, method  # sums in other orders
    assert "all was chosen by what each plan loses on held-out calibration text" in mixed.notes[-1]


def test_two_runs_are_the_same(dense: FxGraph, batches: list[Batch], mixed: Slimmed) -> None:
    again = slimmed(dense, batches, 0.4, *METHODS)
    assert again.notes == mixed.notes
    one, other = (Execution(graph).outputs(batches[0])[0] for graph in (again.graph, mixed.graph))
    assert torch.equal(one, other)


def test_too_little_text_to_hold_any_out_is_told(dense: FxGraph, batches: list[Batch]) -> None:
    assert "too little to hold any of it out" in "".join(slimmed(dense, batches[:7], 0.4, "depth").notes)


def test_macs_can_be_what_is_counted(dense: FxGraph, batches: list[Batch]) -> None:
    found = slimmed(dense, batches, 0.3, "depth", "width", cost="macs")
    cost = CostModel("macs", 24)
    assert 0.3 <= 1 - cost.total(found.graph) / cost.total(dense) < 0.36


def test_more_than_all_of_it(dense: FxGraph, batches: list[Batch]) -> None:
    with pytest.raises(NothingToSlimError, match=r"--ratio 0\.9: rank cannot remove that much"):
        slimmed(dense, batches, 0.9, "rank")


def test_a_block_is_priced_at_what_dropping_it_loses(dense: FxGraph, batches: list[Batch]) -> None:
    """Priced on a part of the text, in a run that passes the block by."""
    blocks = find_blocks(dense)
    prices = price_drops(dense, [(block.start.name, block.end.name) for block in blocks], batches)
    for block in blocks:
        dropped = dense.copy()
        DropLayers([block])(dropped)
        assert prices[block.end.name] == pytest.approx(price_graph(dense, dropped, batches, "decoder"), rel=0.3)


def test_a_rank_is_priced_at_what_it_loses(dense: FxGraph, batches: list[Batch]) -> None:
    name = factorable(dense, find_blocks(dense)[0])[-1].name
    curve = measure_rank_curves(dense, [name], batches)[name]
    rank = probed_rank(dense.weight(dense.op(name)))
    assert (curve[:-1] >= curve[1:]).all()
    assert curve[-1] == 0
    found = factorize_graph(dense, batches, [RankCut(name, rank)], QUIET, dense_targets=False)
    assert float(curve[rank]) == pytest.approx(price_graph(dense, found.graph, batches, "decoder"), rel=0.3)


def test_of_one_sublayer_one_method_cuts(dense: FxGraph, batches: list[Batch]) -> None:
    options = Options(methods=METHODS)
    cost = CostModel()
    offers = Offers(dense, find_regions(dense), batches, METHODS, cost, options, QUIET, "decoder")
    for ratio in (0.1, 0.3, 0.5):
        plan = offers.plan(ratio, METHODS, {})
        assert isinstance(plan, MixedPlan)
        assert sum(plan.saved.values()) >= ratio * cost.total(dense) - 1e-6
        ranks = {cut.op for cut in plan.ranks}
        for region in offers.regions:
            if region.name in plan.widths:
                assert not ranks & {*region.writers, *region.readers}
        gone = {name for i in plan.gone for name in offers.blocks[i].ops}
        assert not gone & ranks
