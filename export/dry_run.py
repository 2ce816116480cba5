"""What an export would do, and take, told before any weight is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch

from dotresize_fx.cost import CostModel, one_stream
from dotresize_fx.device import compute_device, computes_in_half, free_on_gpu, stream_place
from dotresize_fx.errors import UsageError
from dotresize_fx.export.analyse import analyse
from dotresize_fx.export.model_source import load_model
from dotresize_fx.export.onnx_source import is_onnx_source
from dotresize_fx.export.open_model import reads_given_inputs
from dotresize_fx.export.stand_ins import stand_ins
from dotresize_fx.forecast import Forecast, Work, forecast, stream_bytes
from dotresize_fx.memory import show_size
from dotresize_fx.options import Options
from dotresize_fx.passes.choose_regions import choose_regions, why_not_cut
from dotresize_fx.passes.plan_widths import plan_widths
from dotresize_fx.plan_table import plan_table
from dotresize_fx.progress import Progress
from dotresize_fx.regions import MatchReport, Region, RegionKind, counted
from dotresize_fx.structure_options import changes_structure
from dotresize_fx.width_plan import step_of

STREAMS_WAIT = {
    "device": "",
    "pinned": "; the sweep's streams wait in the host's memory",
    "files": "; the sweep's streams wait in files too",
}


@dataclass(frozen=True)
class DryRun:
    """``text`` is for people; the forecast is the last of it."""

    text: str
    forecast: Forecast


def dry_run(name: str, options: Options, *, trust_remote_code: bool, progress: Progress) -> DryRun:
    """Only configuration, tokenizer and the headers of weight files are read, and nothing is written.

    Raises:
        UsageError: the model is no Hugging Face folder, or what is asked for is no plan of widths by a ratio.
        NothingToSlimError: see :func:`plan_widths`.
    """
    _check(name, options)
    with progress.stage("load"):
        loaded = load_model(name, trust_remote_code=trust_remote_code, reads=False)
    if not loaded.lazy:
        raise UsageError(
            f"--dry-run: {name} has no safetensors files, whose headers tell the shapes: save it with save_pretrained "
            "first"
        )
    with stand_ins(loaded.model):
        _, graph, matches = analyse(loaded, progress, cache=options.cache, compare=False)
        regions, beside = choose_regions(graph, matches.regions, options.kinds)
        length = options.sequence_length
        cost = CostModel(options.cost or "weights", length)
        total = cost.total(graph)
        uniform = replace(options, allocation="uniform")
        plan, notes = plan_widths(graph, regions, [], total, cost, uniform, progress, loaded.task)
        cut = [region for region in regions if region.name in plan.widths]
        went = sum((r.width - plan.widths[r.name]) * cost.per_unit(graph, r) for r in cut)
        weights = sum(tensor.numel() * 4 for tensor in {id(p): p for p in loaded.model.parameters()}.values())
        device = compute_device(options)
        memory = replace(options.memory, gpu=free_on_gpu(device))
        lazy = memory.is_short_of(weights)
        tokens = options.tokens_that_calibrate(loaded.task)
        work = Work(
            tokens=tokens,
            measuring=options.evaluation_tokens,
            length=length,
            device=device,
            lazy=lazy,
            streams="device",
            half=computes_in_half(options, loaded.stored, device),
            measured=options.allocation != "uniform",
            analysed=sum(progress.seconds[name] for name in ("load", "capture", "find regions")),
            stored=(loaded.stored or torch.float32).itemsize,
            ratio=options.ratio or 0.0,
            steps=options.steps_taken(loaded.task),
        )
        if lazy:
            batch = one_stream(graph, work.at_once)
            work = replace(work, streams=stream_place(memory, stream_bytes(graph, tokens), device, batch))
        told = forecast(graph, regions, work)
    where = "stay in their files and are read as needed" if lazy else "are held in memory"
    text = "\n".join(
        [
            *_matched(matches, {region.name: why_not_cut(graph, region) for region in matches.regions}),
            *beside,
            *notes,
            "",
            plan_table(cut, plan.widths),
            *_grid(regions, options),
            f"--ratio {options.ratio} would remove {went / total:.1%} of the {cost.name} ({went} of {total}), cut "
            "uniformly; "
            + ("as it is asked for" if options.allocation == "uniform" else "which widths go is measured, on data"),
            "",
            f"weights: {show_size(weights)} in float32, which {where}" + STREAMS_WAIT[work.streams],
            *told.lines(),
            *_beyond(told, options),
        ]
    )
    return DryRun(text, told)


def _beyond(told: Forecast, options: Options) -> list[str]:
    """Whether the host's memory is more than was allowed."""
    budget = options.memory.budget
    if budget is None or told.host <= budget:
        return []
    return [f"--memory-budget {show_size(budget)} is less than that: this export may take more"]


def _check(name: str, options: Options) -> None:
    if is_onnx_source(name) or reads_given_inputs(name):
        raise UsageError(f"--dry-run is for models with a configuration: inspect says what is matched in {name}")
    other = {
        "--plan": options.plan is not None,
        "--methods": bool(options.methods),
        "--merge, or --method of ranks,": changes_structure(options),
        "--profile": options.profile,
        "--target-latency": options.target_latency is not None,
        "--regions residual": RegionKind.RESIDUAL in options.kinds,
        f"--effort {options.effort}": options.effort == "heal",
    }
    if said := next((name for name, asked in other.items() if asked), ""):
        raise UsageError(f"--dry-run foretells widths cut by a ratio, and no {said}: leave it out")


def _matched(matches: MatchReport, reasons: dict[str, str]) -> list[str]:
    """How many regions of a kind and width, and what of them is left alone."""
    cut: Counter[str] = Counter()
    for region in matches.regions:
        why = reasons[region.name]
        cut[f"{region.kind}, {region.width} wide, {region.symmetry}" + (f" (left alone: {why})" if why else "")] += 1
    matched = sum(row.matched for row in matches.linears)
    return [
        f"{counted(len(matches.regions), 'region')}, {matched} of {counted(len(matches.linears), 'linear')} matched",
        *(f"  {count} x {what}" for what, count in cut.items()),
    ]


def _grid(regions: list[Region], options: Options) -> list[str]:
    steps = {(str(r.kind), r.width): step_of(r, options.multiple, 1, options.finest_step) for r in regions}
    return [f"  grid: {kind} of {width} in steps of {step}" for (kind, width), step in steps.items()]
