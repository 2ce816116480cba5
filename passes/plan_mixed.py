"""Spend one budget on widths, ranks and depth: what each cut of each block saves, and is predicted to lose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dotresize_fx.cost import CostModel
from dotresize_fx.depth.prices import price_drops
from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.mixed.frontier import DEPTH, RANK, WIDTH, Cut, Frontier, Point, choose, either, hull, scaled, together
from dotresize_fx.options import Options
from dotresize_fx.passes.choose_regions import choose_regions
from dotresize_fx.passes.factorize_graph import factorable, stream_target
from dotresize_fx.passes.find_blocks import Block, find_blocks
from dotresize_fx.progress import Progress
from dotresize_fx.rank.budget import break_even
from dotresize_fx.rank.curves import measure_rank_curves
from dotresize_fx.rank.rank_sweep import RankCut
from dotresize_fx.regions import MatchReport, Region, RegionKind
from dotresize_fx.sensitivity import measure_curves
from dotresize_fx.width_plan import grid, step_of


@dataclass(frozen=True)
class MixedPlan:
    """``widths`` by region name, of regions that are cut; ranks of linears; blocks that go, numbered as they come.

    ``predicted``: the sum of losses; ``saved``: of the cost, by method.
    """

    widths: Mapping[str, int]
    ranks: tuple[RankCut, ...]
    gone: tuple[int, ...]
    predicted: float
    saved: Mapping[str, float]


class Offers:
    """What can be saved in each block, at what loss, by each of ``methods`` of a graph.

    Of one sublayer either widths are cut or linears factorised; whole KV heads and the widths of heads rule each other
    out; of a block that goes nothing else is cut.

    Raises:
        NothingToSlimError: the graph has no blocks.
    """

    def __init__(
        self,
        graph: FxGraph,
        matches: MatchReport,
        batches: Sequence[Mapping[str, torch.Tensor]],
        methods: Sequence[str],
        cost: CostModel,
        options: Options,
        progress: Progress,
        task: str,
    ) -> None:
        self.graph, self.cost, self.total = graph, cost, cost.total(graph)
        self.blocks = find_blocks(graph)
        self.notes: tuple[str, ...] = ()
        self.regions: list[Region] = []
        self.cuts: dict[Cut, Frontier] = {}  # of each alone
        if WIDTH in methods:
            self.regions, self.notes = choose_regions(graph, matches.regions, options.kinds)
            with progress.stage("measure sensitivity") as step:
                curves = measure_curves(graph, self.regions, batches, task=task, advanced=step)
            for region in self.regions:
                grid_step = step_of(region, options.multiple, 1, options.finest_step)
                self.cuts[WIDTH, region.name] = self._width(region, curves[region.name], grid_step)
        if RANK in methods:
            names = [op.name for block in self.blocks for op in factorable(graph, block)]
            with progress.stage("measure sensitivity to ranks") as step:
                ranks = measure_rank_curves(graph, names, batches, task=task, advanced=step)
            self.cuts |= {(RANK, name): self._rank(name, curve) for name, curve in ranks.items()}
        if DEPTH in methods:
            states = [(block.start.name, block.end.name) for block in self.blocks]
            with progress.stage("measure sensitivity to blocks") as step:
                drops = price_drops(graph, states, batches, task=task, advanced=step)
            for block in self.blocks:
                cut = DEPTH, block.end.name
                self.cuts[cut] = hull([Point(cost.of(graph, block.ops), drops[block.end.name], {cut: 0})])

    def plan(self, ratio: float, methods: Sequence[str], scales: Mapping[str, float]) -> MixedPlan | None:
        """The least predicted loss, each method's times its scale, that saves ``ratio`` of the cost; None if none does.

        One block at least stays.
        """
        inside = {name: i for i, block in enumerate(self.blocks) for name in block.ops}
        of_block: dict[int, list[Region]] = defaultdict(list)
        alone: list[Frontier] = []
        for region in self.regions if WIDTH in methods else ():
            if (number := inside.get(region.writers[0])) is not None:
                of_block[number].append(region)
            else:
                alone.append(scaled(self._widths([region]), scales.get(WIDTH, 1.0)))
        frontiers = [self._of_block(block, of_block[i], methods, scales) for i, block in enumerate(self.blocks)]
        wanted = ratio * self.total
        point = choose([*frontiers, *alone], wanted)
        if point is not None and sum(what == DEPTH for what, _ in point.sizes) == len(self.blocks):
            return None
        return None if point is None else self._spelled(point)

    def _of_block(
        self, block: Block, regions: Sequence[Region], methods: Sequence[str], scales: Mapping[str, float]
    ) -> Frontier:
        by_width: dict[str, list[Region]] = defaultdict(list)
        for region in regions:
            by_width[self._state(block, region.writers[0])].append(region)
        by_rank: dict[str, list[str]] = defaultdict(list)
        for name in block.ops:
            if RANK in methods and (RANK, name) in self.cuts:
                by_rank[self._state(block, name)].append(name)
        parts = [
            either(
                scaled(self._widths(by_width[state]), scales.get(WIDTH, 1.0)),
                scaled(together(*(self.cuts[RANK, name] for name in by_rank[state])), scales.get(RANK, 1.0)),
            )
            for state in dict.fromkeys([*by_width, *by_rank])
        ]
        if DEPTH not in methods:
            return together(*parts)
        return either(together(*parts), scaled(self.cuts[DEPTH, block.end.name], scales.get(DEPTH, 1.0)))

    def _state(self, block: Block, name: str) -> str:
        """The stream's state that the op comes before: its sublayer."""
        at = self.graph.positions[name]
        return next(state for state in block.states if self.graph.positions[state] >= at)

    def _widths(self, regions: Sequence[Region]) -> Frontier:
        """Of the regions of a sublayer."""
        attentions: dict[str, list[Region]] = defaultdict(list)
        for region in regions:
            attentions[region.attention or region.name].append(region)
        return together(
            *(
                either(
                    together(*(self.cuts[WIDTH, one.name] for one in parts if one.kind is not RegionKind.HEADS)),
                    together(*(self.cuts[WIDTH, one.name] for one in parts if one.kind is RegionKind.HEADS)),
                )
                for parts in attentions.values()
            )
        )

    def _width(self, region: Region, curve: torch.Tensor, step: int) -> Frontier:
        unit = self.cost.per_unit(self.graph, region)
        widths = [width for width in range(step, region.width, step) if curve[width].isfinite()][::-1]
        losses = curve[widths].cummax(0).values.tolist() if widths else []
        return hull(
            Point((region.width - width) * unit, loss, {(WIDTH, region.name): width})
            for width, loss in zip(widths, losses, strict=True)
        )

    def _rank(self, name: str, curve: torch.Tensor) -> Frontier:
        rows, columns = self.graph.weight(self.graph.op(name)).shape
        most = break_even(rows, columns)
        unit = self.cost.of(self.graph, [name]) / (rows * columns)
        step = grid(most)
        return hull(
            Point((rows * columns - rank * (rows + columns)) * unit, float(curve[rank]), {(RANK, name): rank})
            for rank in range(step, most + 1, step)
        )

    def _spelled(self, point: Point) -> MixedPlan:
        saved = dict.fromkeys((WIDTH, RANK, DEPTH), 0.0)
        for cut, size in point.sizes.items():
            saved[cut[0]] += next(one.saved for one in self.cuts[cut] if one.sizes.get(cut) == size)
        ranks = [
            RankCut(name, point.sizes[RANK, name], stream_target(self.graph, self.graph.op(name), block.states))
            for block in self.blocks
            for name in block.ops
            if (RANK, name) in point.sizes
        ]
        widths = {name: size for (what, name), size in point.sizes.items() if what == WIDTH}
        gone = [i for i, block in enumerate(self.blocks) if (DEPTH, block.end.name) in point.sizes]
        return MixedPlan(widths, tuple(ranks), tuple(gone), point.loss, saved)


def check_reached(plan: MixedPlan | None, ratio: float, methods: Sequence[str]) -> MixedPlan:
    """
    Raises:
        NothingToSlimError: there is no plan.
    """
    if plan is None:
        raise NothingToSlimError(
            f"--ratio {ratio}: {', '.join(methods)} cannot remove that much: choose a lower ratio or more --methods"
        )
    return plan
