"""The sweep over a graph's regions: each is solved for, cut and folded, and what reads it refitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dotresize_fx.depth.gone_block import GoneBlock
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.journal import FinishedSublayer, Journal, map_shape, of_shape
from dotresize_fx.least_squares import ENCODER_PULL, PULL
from dotresize_fx.options import Options
from dotresize_fx.passes.choose_regions import REFITTED, sublayers
from dotresize_fx.passes.cut_stream import apply_map
from dotresize_fx.progress import Progress
from dotresize_fx.rank.low_rank_linear import LowRankLinear
from dotresize_fx.ranks import Ranks
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region, RegionKind, counted
from dotresize_fx.repair import ENCODER_LEARNING_RATE
from dotresize_fx.slim_stream import SlimStream
from dotresize_fx.solvers import solvers_for
from dotresize_fx.sublayer_writer import SublayerWriter
from dotresize_fx.sweep import Sweep, SweptRegion
from dotresize_fx.task import predicts_tokens
from dotresize_fx.width_plan import WidthPlan


@dataclass(frozen=True)
class Slimmed:
    """A slim graph, what was cut in it and by which width plan, and notes for the report. ``gone`` are the
    dense graph's blocks that it has not, ``factorized`` its linears that are two.
    """

    graph: FxGraph
    swept: tuple[SweptRegion, ...] = ()
    plan: WidthPlan = field(default_factory=lambda: WidthPlan({}))
    notes: tuple[str, ...] = ()
    gone: tuple[GoneBlock, ...] = ()
    factorized: tuple[LowRankLinear, ...] = ()


def sweep_regions(
    dense: FxGraph,
    slimmed: FxGraph,
    regions: list[Region],
    plan: WidthPlan,
    batches: Sequence[Mapping[str, torch.Tensor]],
    options: Options,
    progress: Progress,
    task: str,
    refit: bool,
    journal: Journal | None = None,
    stream: SlimStream | None = None,
    *,
    changed: bool = False,
    ranks: Ranks | None = None,
) -> list[SweptRegion]:
    """Cut the regions to the plan's widths in place, sublayer by sublayer.

    ``journal`` takes finished sublayers, and has those of an earlier run, which are not solved for again (where the
    stream itself was cut they are). ``refit``: whether readers are refitted. ``stream`` tells how the stream itself
    was cut, if it was. ``changed``: the stream is not the dense graph's any more, and regions that keep their widths
    are refitted too. ``ranks``: see Sweep.
    """
    maps: dict[str, dict[str, Any]] = {}

    def apply(region: Region, found: RegionMap) -> None:
        maps[region.name] = map_shape(found)
        apply_map(slimmed, region, found, options.check)

    sweep = Sweep(
        dense,
        slimmed,
        batches,
        apply,
        refit=refit,
        stream=stream,
        repair_steps=options.steps_taken(task),
        repair_rate=None if predicts_tokens(task) else ENCODER_LEARNING_RATE,
        pull=PULL if predicts_tokens(task) else ENCODER_PULL,
        seed=options.seed,
        ranks=ranks,
    )
    if stream is not None:
        journal = None  # what was solved for behind another cut of it is of no use
    if journal is not None and journal.finished:
        progress.show(f"goes on behind {counted(journal.finished, 'sublayer')} of an earlier run")
    swept: list[SweptRegion] = []
    beside = next(iter(slimmed.program.state_dict.values())).is_cuda
    with progress.stage("sweep", len(regions)) as step, SublayerWriter(slimmed, journal, beside=beside) as writer:
        for number, together in enumerate(sublayers(regions)):
            cuts = [(region, plan.widths[region.name]) for region in together]
            if chosen := cut_or_refitted(cuts, stream_cut=changed or stream is not None):
                finished = journal.sublayer(number, together) if journal else None
                if finished is not None:
                    sweep.resume_sublayer([region for region, _ in chosen], lambda: _take(finished, slimmed, together))  # noqa: B023
                    swept += finished.swept
                else:
                    writer.begin()
                    maps.clear()
                    found = sweep.slim_sublayer(chosen, lambda region: solvers_for(options.method, region.kind))
                    writer.put(number, found, maps)
                    swept += found
            for _ in together:
                step()
    if journal is not None and journal.damaged:
        progress.show(f"{counted(journal.damaged, 'finished sublayer')} found damaged and solved for again")
    behind = sweep.finish()
    if swept and behind:
        swept[-1] = replace(swept[-1], notes={**swept[-1].notes, **behind})
    return swept


def cut_or_refitted(cuts: Sequence[tuple[Region, int]], *, stream_cut: bool) -> list[tuple[Region, int]]:
    """Those of a sublayer that are cut; and where scores or the stream were, the full widths whose reader is refitted.

    Where whole heads go, their cut refits the reader of the values, whose own region is then another.
    """
    cut = [region for region, width in cuts if width < region.width]
    scores = any(region.kind is RegionKind.QUERY_KEY for region in cut)
    again = REFITTED if stream_cut else (RegionKind.VALUE,) if scores else ()
    fewer = [region.attention for region in cut if region.kind is RegionKind.HEADS]
    return [(r, w) for r, w in cuts if w < r.width or (r.kind in again and r.attention not in fewer)]


def _take(finished: FinishedSublayer, graph: FxGraph, regions: Sequence[Region]) -> None:
    """Make the ops of a finished sublayer, and give them its parameters."""
    weights = graph.program.state_dict
    device = next(iter(weights.values())).device
    for region in regions:
        if region.name in finished.maps:
            apply_map(graph, region, of_shape(finished.maps[region.name], device), False)
    for name, stored in finished.parameters.items():
        weight = stored.to(device) if graph.spool is not None else stored.read().to(device, copy=True)
        weights[name] = torch.nn.Parameter(weight, requires_grad=False)
