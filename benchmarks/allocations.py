"""Width plans by other rules than the compiler's own: block influence, and shares by inverse sensitivity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from texts import Batches

from dotresize_fx.cost import count_cost, weights_per_unit
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import token_rows
from dotresize_fx.passes.choose_regions import choose_regions, sublayers
from dotresize_fx.regions import MatchReport, Region, RegionKind
from dotresize_fx.width_plan import WidthPlan, step_of

# No sublayer loses more by influence: what MoDeGPT's stand-in in peers/ allows, for the same reason.
LARGEST_SHARE = 0.8


def cuttable(graph: FxGraph, matches: MatchReport, kinds: Sequence[RegionKind]) -> list[Region]:
    """The regions of these kinds that the sweep takes, without whole KV heads."""
    chosen, _ = choose_regions(graph, matches.regions, [kind for kind in kinds if kind is not RegionKind.HEADS])
    return chosen


def plan_by_shares(
    graph: FxGraph,
    regions: Sequence[Region],
    wishes: Mapping[str, float],
    ratio: float,
    *,
    least: float = 0.0,
    most: float = LARGEST_SHARE,
) -> WidthPlan:
    """Every region loses a share in proportion to its wish, clipped, so that ``ratio`` of the block weights goes.

    Widths are on the region's grid; those that rounding down hurts most are rounded up until the sum is right.

    Raises:
        ValueError: the regions hold too little for the ratio.
    """
    units = {region.name: weights_per_unit(graph, region) for region in regions}
    wanted = ratio * count_cost(graph, 1).block_linear_weights
    limits = {r.name: (least, min(most, 1 - step_of(r) / r.width)) for r in regions}

    def shares(factor: float) -> dict[str, float]:
        return {name: min(max(factor * wishes[name], low), high) for name, (low, high) in limits.items()}

    def removed(found: Mapping[str, float]) -> float:
        return sum(found[r.name] * r.width * units[r.name] for r in regions)

    fewest, largest = (removed({name: limit[i] for name, limit in limits.items()}) for i in (0, 1))
    if not fewest <= wanted <= largest:
        raise ValueError(f"shares from {least:.0%} to {most:.0%} of these regions cannot remove {ratio:.0%}")
    low, high = 0.0, 1.0
    while removed(shares(high)) < wanted and high < 1e30:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(shares(middle)) < wanted else (low, middle)
    found = shares(high)
    ideal = {r.name: r.width * (1 - found[r.name]) for r in regions}
    widths = {r.name: max(step_of(r), int(ideal[r.name] + 1e-6) // step_of(r) * step_of(r)) for r in regions}
    gone = sum((r.width - widths[r.name]) * units[r.name] for r in regions)
    for region in sorted(regions, key=lambda r: ((widths[r.name] - ideal[r.name]) / r.width, r.name)):
        above = min(widths[region.name] + step_of(region), region.width)
        gain = (above - widths[region.name]) * units[region.name]
        if gone - gain / 2 >= wanted:
            widths[region.name] = above
            gone -= gain
    return WidthPlan(widths)


def block_influences(graph: FxGraph, regions: Sequence[Region], batches: Batches) -> dict[str, float]:
    """By target, 1 - mean cosine of the stream before and after each sublayer of the dense program."""
    execution = Execution(graph)
    around = []
    for together in sublayers(regions):
        after = graph.op(together[0].target)
        # Of what is added, the stream is what was there first.
        before = min(after.inputs, key=lambda v: -1 if (op := graph.producer(v)) is None else graph.positions[op.name])
        around.append((after.name, graph.node(before.name), graph.node(after.name)))
    cosines, tokens = dict.fromkeys((name for name, _, _ in around), 0.0), 0
    for batch in batches:
        mask, position = batch.get("attention_mask"), 0
        environment = execution.start(batch)
        for name, before, after in around:
            stop = execution.index[after] + 1
            values = execution.run(environment, position, stop, keep=[before, after])
            position = stop
            rows = token_rows(values[before], mask), token_rows(values[after], mask)
            cosines[name] += float(torch.nn.functional.cosine_similarity(*rows).double().sum())
        tokens += int(mask.sum()) if mask is not None else batch["input_ids"].numel()
    return {name: 1 - cosine / tokens for name, cosine in cosines.items()}


def influence_wishes(
    regions: Sequence[Region], influences: Mapping[str, float], temperature: float
) -> dict[str, float]:
    """MoDeGPT's rule, on sublayers instead of layers: softmax of -influence / temperature."""
    names = list(influences)
    weights = (-torch.tensor([influences[name] for name in names], dtype=torch.float64) / temperature).softmax(0)
    by_target = dict(zip(names, weights.tolist(), strict=True))
    return {region.name: by_target[region.target] for region in regions}


def price_wishes(prices: Mapping[str, float], power: float) -> dict[str, float]:
    """In proportion to 1 / sensitivity^power."""
    least = max(prices.values()) * 1e-12
    return {name: max(price, least) ** -power for name, price in prices.items()}
