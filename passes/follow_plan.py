"""Hold a width plan that a user gave against the regions of the model."""

from __future__ import annotations

from collections.abc import Sequence

from dotresize_fx.errors import UsageError
from dotresize_fx.graph import Graph
from dotresize_fx.passes.choose_regions import why_not_cut
from dotresize_fx.regions import MatchReport, Region, RegionKind
from dotresize_fx.solvers import METHODS, solvers_for
from dotresize_fx.width_plan import WidthPlan, step_of


def check_plan(plan: WidthPlan, matches: MatchReport, method: str) -> None:
    """Raises UsageError unless the plan names widths of this model, in their range, that the method cuts, one at
    least of which is cut.
    """
    regions = {region.name: region for region in matches.regions}
    for name, width in plan.widths.items():
        if name not in regions:
            raise UsageError(
                f"--plan names {name!r}, which is no width of this model: `dotresize-fx inspect` lists them"
            )
        whole = regions[name].width
        if not 0 < width <= whole:
            raise UsageError(f"--plan gives {name!r} the width {width}: it must be from 1 to {whole}")
        if width < whole and width % step_of(regions[name], 1):
            raise UsageError(f"--plan gives {name!r} the width {width}: rotary pairs need an even one")
        kind = regions[name].kind
        cuttable = any(kind in kinds for kinds in METHODS.values())
        if width < whole and cuttable and not solvers_for(method, kind):
            raise UsageError(f"--plan cuts {name!r}, a {kind} width, which --method {method} does not cut")
    if plan.widths and all(width == regions[name].width for name, width in plan.widths.items()):
        raise UsageError("--plan cuts nothing: every width in it is the model's own: make one smaller, or give --ratio")
    if sum(regions[name].kind is RegionKind.RESIDUAL for name in plan.widths) > 1:
        raise UsageError("--plan names several residual streams: one is supported")


def follow_plan(plan: WidthPlan, graph: Graph, found: Sequence[Region], regions: list[Region]) -> WidthPlan:
    """The plan's widths for ``regions``, those that can be cut of ``found``; whole widths where it says nothing.

    Raises:
        UsageError: it cuts what cannot be cut, or whole KV heads and a width of the same heads.
    """
    widths = {region.name: plan.widths.get(region.name, region.width) for region in regions}
    cut = [region for region in found if plan.widths.get(region.name, region.width) < region.width]
    for region in cut:
        if region.name not in widths and region.kind is not RegionKind.RESIDUAL:
            why = why_not_cut(graph, region) or "it runs beside another"
            raise UsageError(f"--plan cuts {region.name!r}, which cannot be cut: {why}")
    whole = {region.attention for region in cut if region.kind is RegionKind.HEADS}
    for region in cut:
        if region.attention in whole and region.kind is not RegionKind.HEADS:
            raise UsageError(
                f"--plan cuts {region.name!r} and whole KV heads of the same attention: take one of the two"
            )
    return WidthPlan(widths)
