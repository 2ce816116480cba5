"""Calibration, solving and healing where the options say, alone or with the processes that torchrun started beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from dotresize_fx.calibration import CalibrationData, Inputs
from dotresize_fx.clock import Clock
from dotresize_fx.device import compute_device, give_back
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.journal import Journal
from dotresize_fx.launched import Launched
from dotresize_fx.options import Options
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.passes.sweep_regions import Slimmed
from dotresize_fx.progress import Progress
from dotresize_fx.ranks import Ranks
from dotresize_fx.regions import MatchReport
from dotresize_fx.width_plan import WidthPlan

if TYPE_CHECKING:
    from dotresize_fx.hand_out import Handed


def alone_or_together(options: Options, progress: Progress) -> AbstractContextManager[Launched]:
    """Whether other processes help this one, which is told what they wait for."""
    from dotresize_fx.together import together  # with torch's parts for training

    return together(options, progress, _help_out)


def _help_out(handed: Handed, options: Options, progress: Progress) -> None:
    """On other ranks, what rank 0 does with what it hands them."""
    from dotresize_fx.together import check_alike, heal_handed

    if options.effort == "heal":
        heal_handed(handed, options, progress)
        return
    widths, factors = handed.numbers["widths"], handed.numbers["factors"]
    slimmed = slim_graph(
        handed.dense,
        find_regions(handed.dense),
        handed.sources[0],
        options,
        progress,
        task=handed.task,
        plan=None if widths is None else WidthPlan(widths),
        factors=factors,
        ranks=Ranks(),
    )
    check_alike(slimmed.graph)


def slim_on_device(
    dense: FxGraph,
    matches: MatchReport,
    data: CalibrationData,
    own: Sequence[Inputs],
    plan: WidthPlan | None,
    options: Options,
    progress: Progress,
    journal: Journal | None,
    task: str,
    launched: Launched,
    factors: Mapping[str, int],
    clock: Clock | None,
    *,
    half: bool,
) -> Slimmed:
    """Calibrate, solve and heal where the options say; the slim graph comes back to the CPU.

    ``half``: products of activations are bfloat16's until widths are solved for, and float32's again in what is given.
    """
    device = compute_device(options)
    moved = dense.copy()
    if device != "cpu":
        moved.to(device)
    moved.half_products = half
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in data.calibration]
    shared = options.effort == "fast" and launched.count > 1
    with launched.called() if shared else nullcontext():
        if shared:
            from dotresize_fx.hand_out import Handed, give

            numbers = {"widths": None if plan is None else plan.widths, "factors": factors}
            give(Handed(moved, moved, (batches,), task, numbers))
        slimmed = slim_graph(
            moved,
            matches,
            batches,
            options,
            progress,
            journal,
            task=task,
            plan=plan,
            factors=factors,
            clock=clock,
            ranks=Ranks(alone=not shared),
        )
        if shared:
            from dotresize_fx.together import check_alike

            check_alike(slimmed.graph)
            slimmed = replace(slimmed, notes=(*slimmed.notes, f"{launched.count} processes shared the calibration"))
    moved.half_products = slimmed.graph.half_products = False
    if options.effort == "heal" and (slimmed.swept or slimmed.gone or slimmed.factorized):
        from dotresize_fx.hand_out import Handed, give
        from dotresize_fx.together import heal_handed

        handed = Handed(moved, slimmed.graph, (batches, own), task)
        with launched.called():
            give(handed)
            healed = heal_handed(handed, options, progress)
        slimmed = replace(slimmed, notes=(*slimmed.notes, *healed))
    if device != "cpu":
        slimmed.graph.to("cpu")
        give_back()  # what measures has a process of its own
    return slimmed
