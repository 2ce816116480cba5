"""The sweep over a graph's regions: each is solved for, cut and folded, and what reads it refitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dotresize_fx.depth.gone_block import GoneBlock
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.lazy_tensor import in_memory
from dotresize_fx.least_squares import ENCODER_PULL, PULL
from dotresize_fx.options import Options
from dotresize_fx.passes.choose_regions import REFITTED, sublayers
from dotresize_fx.passes.cut_stream import apply_map
from dotresize_fx.progress import Progress
from dotresize_fx.rank.low_rank_linear import LowRankLinear
from dotresize_fx.ranks import Ranks
from dotresize_fx.regions import Region, RegionKind
from dotresize_fx.repair import ENCODER_LEARNING_RATE
from dotresize_fx.slim_stream import SlimStream
from dotresize_fx.solvers import solvers_for
from dotresize_fx.stored_tensors import lazy_tensors
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
    work: Path | None = None,
    stream: SlimStream | None = None,
    *,
    changed: bool = False,
    ranks: Ranks | None = None,
) -> list[SweptRegion]:
    """Cut the regions to the plan's widths in place, sublayer by sublayer; ``work`` takes finished blocks.

    ``refit``: whether readers are refitted. ``stream`` tells how the stream itself was cut, if it was. ``changed``:
    the stream is not the dense graph's any more, and regions that keep their widths are refitted too. ``ranks``: see
    Sweep.
    """
    sweep = Sweep(
        dense,
        slimmed,
        batches,
        lambda region, found: apply_map(slimmed, region, found, options.check),
        refit=refit,
        stream=stream,
        repair_steps=0 if options.effort == "fast" else options.steps_that_repair(task),
        repair_rate=None if predicts_tokens(task) else ENCODER_LEARNING_RATE,
        pull=PULL if predicts_tokens(task) else ENCODER_PULL,
        seed=options.seed,
        ranks=ranks,
    )
    swept: list[SweptRegion] = []
    with progress.stage("sweep", len(regions)) as step:
        for together in sublayers(regions):
            cuts = [(region, plan.widths[region.name]) for region in together]
            if chosen := cut_or_refitted(cuts, stream_cut=changed or stream is not None):
                swept += sweep.slim_sublayer(chosen, lambda region: solvers_for(options.method, region.kind))
                for region, _ in chosen:
                    _write_block(slimmed, region, work)
            for _ in together:
                step()
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


def _write_block(graph: FxGraph, region: Region, work: Path | None) -> None:
    """Put a finished region's weights into the work folder; where the graph has a spool, they stay there alone."""
    if work is None and graph.spool is None:
        return
    ops = [graph.op(name) for name in (*region.writers, *region.readers)]
    values = {value for op in ops for value in (op.weight, op.bias) if value is not None}
    tensors = {graph.parameter_name(v): in_memory(graph.parameter(v)).contiguous() for v in values}
    stored: dict[str, torch.Tensor] = {}
    if work is not None:
        from safetensors.torch import save_file

        folder = work / "blocks"
        folder.mkdir(exist_ok=True)
        file = folder / f"{region.name}.safetensors"
        save_file(tensors, file)
        stored = dict(lazy_tensors(file, checked=False))
    if graph.spool is not None:
        for name, tensor in tensors.items():
            left = stored[name].to(tensor.device) if stored else graph.spool.put(tensor)
            graph.program.state_dict[name] = torch.nn.Parameter(left, requires_grad=False)
