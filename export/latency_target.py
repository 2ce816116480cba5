"""Widths by the clock: what the regions' kernels take on this machine, and whole models measured end to end."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dotresize_fx.clock import Clock, Measured, between
from dotresize_fx.errors import TargetLatencyError, UsageError
from dotresize_fx.export.bench import SEED, Bench
from dotresize_fx.export.bench_model import open_models
from dotresize_fx.export.bench_phase import PhaseProfile
from dotresize_fx.export.capture import Captured
from dotresize_fx.export.convert_dtype import HALF, convert_dtype
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.kernel_times import kernel_times
from dotresize_fx.export.onnx_session import CPU, CUDA, physical_cores, require_onnx_runtime, require_provider
from dotresize_fx.export.region_kernels import Kernel, kernels_of, steps_of
from dotresize_fx.export.timing import Turns, ratio_interval
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.options import Options
from dotresize_fx.passes.choose_regions import why_not_cut
from dotresize_fx.passes.truncate_regions import truncate_regions
from dotresize_fx.progress import Progress
from dotresize_fx.regions import MatchReport, Region
from dotresize_fx.report.contents import LatencyTarget
from dotresize_fx.width_plan import step_of
from dotresize_fx.workload import Workload

if TYPE_CHECKING:
    from dotresize_fx.slim_result import SlimResult

# Widths of a region that are timed at most; between them a straight line is drawn.
SAMPLES = 12
# Profiled rounds of the dense model, and rounds of two models in turns.
DENSE_RUNS, RUNS = 15, 20


def start_clock(
    model: torch.nn.Module,
    captured: Captured,
    dense: FxGraph,
    matches: MatchReport,
    options: Options,
    progress: Progress,
    work: Path,
) -> Clock:
    """Convert the dense model into ``work``, run the options' workload on it, and time its regions' kernels.

    Raises:
        UsageError: the model reads no text or no sequence that long, or has experts that were to be cut.
        MissingExtraError: ONNX Runtime is not installed, or cannot run on the target.
    """
    require_onnx_runtime()
    if options.target == "cuda":
        require_provider(CUDA, "--target-latency and --profile time --target cuda on a GPU: ")
    workload = _that_it_runs(options.timed_workload, captured)
    regions = [r for r in matches.of_kind(*options.kinds) if not why_not_cut(dense, r)]
    steps = {r.name: step_of(r, options.multiple, finest=options.finest_step) for r in regions}
    samples = {r.name: sampled(r.width, steps[r.name]) for r in regions}
    needed = {
        (region.name, width): run_kernels(dense, region, width, workload)
        for region in regions
        for width in samples[region.name]
    }
    where = Where.of(options)
    with progress.stage("convert dense to ONNX"):
        path = _written(model, captured, dense, work, options)
    with progress.stage(f"profile {workload}"):
        whole_model = model_seconds(path, workload, where)
    whole_kernels = sorted({kernel for region in regions for kernel in needed[region.name, region.width]})
    kernels = {kernel for found in needed.values() for kernel in found}
    times = kernel_times(
        kernels, where.threads, progress, work, anchors=whole_kernels, provider=where.provider, dtype=options.dtype
    )
    seconds = {
        region.name: between(
            {
                width: sum(count * times[kernel] for kernel, count in needed[region.name, width].items())
                for width in samples[region.name]
            },
            region.width,
        )
        for region in regions
    }

    def rehearse(widths: Mapping[str, int]) -> Measured:
        with tempfile.TemporaryDirectory(dir=work, prefix="rehearsal-") as folder:
            with progress.stage("convert a model of planned widths"):
                slim = truncate_regions(dense, regions, widths)
                other = _written(model, captured, slim, Path(folder), options)
            return compare([path, other], workload, where, progress)

    return Clock(workload, seconds, whole_model, rehearse, options.target_latency)


@dataclass(frozen=True)
class Where:
    """What runs the models."""

    threads: int
    provider: str

    @classmethod
    def of(cls, options: Options) -> Where:
        """A thread a physical core, on the options' target."""
        return cls(physical_cores(), CUDA if options.target == "cuda" else CPU)


def _written(model: torch.nn.Module, captured: Captured, graph: FxGraph, folder: Path, options: Options) -> Path:
    """model.onnx in the options' dtype."""
    path = emit_onnx(model, captured, graph, folder, options.target)
    if options.dtype not in HALF:
        return path
    (half := folder / options.dtype).mkdir(exist_ok=True)
    return convert_dtype(path, half, options.dtype)


def _that_it_runs(asked: Workload, captured: Captured) -> Workload:
    if captured.inputs is not None:
        raise UsageError("--target-latency and --profile run prompts, which a module or a program does not read")
    workload = asked if captured.cache is not None else replace(asked, decode=0)
    if workload.prompt + workload.decode > captured.longest:
        raise UsageError(f"--workload {workload}: the model reads at most {captured.longest} tokens")
    return workload


def sampled(width: int, step: int) -> list[int]:
    """The widths of a region that are timed: its own, and evenly spread ones of its grid, the smallest among them."""
    grid = [*range(step, width, step), width]
    count = min(SAMPLES, len(grid))
    return sorted({grid[round(i * (len(grid) - 1) / max(count - 1, 1))] for i in range(count)} | {width})


def run_kernels(graph: FxGraph, region: Region, width: int, workload: Workload) -> Counter[Kernel]:
    """What the whole workload multiplies where the region is ``width`` wide."""
    found: Counter[Kernel] = Counter()
    for step, times in steps_of(workload):
        for kernel, count in kernels_of(graph, region, width, step).items():
            found[kernel] += count * times
    return found


def measure_workload(
    paths: Sequence[Path], workload: Workload, where: Where, runs: int, progress: Progress
) -> list[Turns]:
    """Each model's rounds, in turns."""
    models = open_models(paths)
    device = "cuda" if where.provider == CUDA else "cpu"
    turns = Bench(models, runs, where.threads, device, progress).turns(workload)
    return [turns[model.name] for model in models]


def compare(
    paths: Sequence[Path], workload: Workload, where: Where, progress: Progress, target: float | None = None
) -> Measured:
    """The second model's seconds of a workload over the first one's, with the ends of the 95 % interval.

    Where that is above a ``target`` by more than noise as many rounds again are run, and all of them count.
    """
    rounds: tuple[list[float], list[float]] = ([], [])
    for _ in range(2):
        for side, turns in zip(rounds, measure_workload(paths, workload, where, RUNS, progress), strict=True):
            side.extend(whole(prompt, tokens) for prompt, tokens in zip(turns.prompt, turns.tokens, strict=True))
        measured = ratio_interval(*rounds, seed=SEED)
        if target is None or measured[1] <= target:
            break
    return measured


def whole(prompt: float, tokens: Sequence[float]) -> float:
    """Seconds of a round: the prompt's and its tokens'."""
    return prompt + sum(tokens)


def model_seconds(path: Path, workload: Workload, where: Where) -> float:
    """What a model's nodes take in a workload, counted as the kernels are: where others use the machine no whole run is
    left alone as a single kernel is, and the two could not be compared. A GPU is left alone, and its nodes cannot be
    told apart: there it is whole runs.
    """
    if where.provider == CUDA:
        (turns,) = measure_workload([path], workload, where, DENSE_RUNS, Progress(quiet=True))
        least: float = min(turns.prompt) + sum(min(taken) for taken in zip(*turns.tokens, strict=True))
        return least
    (model,) = open_models([path])

    def fastest(tokens: int, past: int) -> float:
        phase = PhaseProfile(
            threads=where.threads, provider=where.provider, batch=workload.batch, length=tokens, past=past
        )
        return phase.fastest(model, DENSE_RUNS)

    return sum(times * fastest(step.tokens, step.keys - step.tokens) for step, times in steps_of(workload))


def prove_target(result: SlimResult, dense: Path, slim: Path) -> LatencyTarget:
    """Measure the finished model as its rehearsals were.

    Raises:
        TargetLatencyError: it misses the target by more than noise.
    """
    clock = result.clock
    assert clock is not None
    where = Where.of(result.options)
    value, low, high = compare([dense, slim], clock.workload, where, result.progress, clock.target)
    if clock.target is not None and low > clock.target:
        raise TargetLatencyError(
            f"--target-latency {clock.target}: the slim model takes {value:.3f} of the dense latency ({low:.3f} to "
            f"{high:.3f}, {clock.workload}), though a model of its widths was measured below it: nothing was written; "
            "run again when the machine is idle, or choose a higher one"
        )
    rehearsals = tuple(trial.measured[0] for trial in clock.trials)
    return LatencyTarget(
        workload=str(clock.workload),
        target=clock.target,
        predicted=clock.predicted(result.slimmed.plan.widths),
        measured=value,
        low=low,
        high=high,
        rehearsals=rehearsals,
        threads=where.threads,
    )
