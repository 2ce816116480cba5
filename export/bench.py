"""The benchmark: ONNX files side by side, their latency in turns, their memory, and what their MACs are worth."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

from dotresize_fx.errors import OutOfMemoryError, UsageError
from dotresize_fx.export.bench_model import GivenModel, open_models, sizes_told
from dotresize_fx.export.bench_phase import PhaseProfile, idle_gpu, request_for, unknown_business
from dotresize_fx.export.onnx_session import CPU, CUDA, physical_cores, require_onnx_runtime
from dotresize_fx.export.runtime_child import RuntimeChild
from dotresize_fx.export.timing import WARM_UP, Conditions, Turns, latency, ratio_interval, take_turns
from dotresize_fx.progress import Progress
from dotresize_fx.report.bench_contents import (
    BenchModel,
    BenchReport,
    Peak,
    Phase,
    Ratio,
    RunFigures,
    WorkloadFigures,
)
from dotresize_fx.report.provenance import package_versions, this_machine
from dotresize_fx.workload import Workload

PROVIDERS = {"cpu": CPU, "cuda": CUDA}
SEED = 0


class Bench:
    """One benchmark of ``models``; ``measure`` is called once a workload."""

    def __init__(self, models: Sequence[GivenModel], runs: int, threads: int, device: str, progress: Progress) -> None:
        self.models, self.runs, self.threads, self.progress = models, runs, threads, progress
        self.provider = PROVIDERS[device]
        self.device = device

    def measure(self, asked: Workload) -> WorkloadFigures:
        """Raises OutOfMemoryError where even one sequence finds no room."""
        workload, notes = sizes_told(self.models[0], asked)
        why = next((why for why in (model.why_no_tokens(workload) for model in self.models) if why), "")
        if why:
            workload = replace(workload, decode=0)
        if why and asked.decode:
            notes.append(f"time per output token is not measured: {why}")
        while True:
            try:
                turns = self.turns(workload)
                break
            except OutOfMemoryError as error:
                if workload.batch == 1 or not self.models[0].batch_is_free:
                    raise
                smaller = replace(workload, batch=workload.batch // 2)
                notes.append(f"no memory for batch {workload.batch}, so batch {smaller.batch} was run ({error})")
                workload = smaller
        phases = [self._phase("prompt", workload, turns, notes)]
        if workload.decode:
            phases.append(self._phase("output token", workload, turns, notes))
        return WorkloadFigures(
            prompt=workload.prompt,
            decode=workload.decode,
            batch=workload.batch,
            phases=tuple(phases),
            peaks=tuple(
                Peak(model=name, rss_bytes=t.peak_rss_bytes, device_bytes=t.device_bytes) for name, t in turns.items()
            ),
            notes=tuple(dict.fromkeys(notes)),
        )

    def turns(self, workload: Workload) -> dict[str, Turns]:
        """All models' rounds of a workload that they can run, warmed up."""
        with ExitStack() as stack:
            children = {}
            for model in self.models:
                child = children[model.name] = stack.enter_context(RuntimeChild())
                request = request_for(model, self.threads, self.provider, workload.batch, workload.prompt)
                answer = child.ask("open", **request)
                self.device = answer["device"] or self.device
            with self.progress.stage(f"time {workload}", self.runs) as step:
                return take_turns(children, runs=self.runs, warmup=WARM_UP, tokens=workload.decode, step=step)

    def _phase(self, name: str, workload: Workload, turns: dict[str, Turns], notes: list[str]) -> Phase:
        if name == "prompt":
            length, past = workload.prompt, 0
            seconds = {model: found.prompt for model, found in turns.items()}
            detail = "one run, without anything cached"
        else:
            length, past = 1, workload.prompt + workload.decode // 2
            seconds = {model: [median(one) for one in found.tokens] for model, found in turns.items()}
            end = workload.prompt + workload.decode - 1
            detail = (
                f"median of a round's, behind {workload.prompt} to {end} cached tokens (MACs and bytes behind {past})"
            )
        where = Conditions(self.threads, self.provider, workload.batch, length if self.models[0].reads_text else None)
        profile = PhaseProfile(
            threads=self.threads, provider=self.provider, batch=workload.batch, length=length, past=past
        )
        runs: list[RunFigures] = []
        with self.progress.stage(f"count MACs and bytes of the {name}"):
            for model in self.models:
                counted, found = profile.counted(model), seconds[model.name]
                notes += counted.notes
                taken = latency(found, where)
                busy, launching = profile.business(model, taken.median)
                run = RunFigures(
                    model=model.name,
                    latency=taken,
                    tokens_per_run=workload.batch * length if model.reads_text else None,
                    macs=counted.macs,
                    weight_bytes=counted.weight_bytes,
                    cache_bytes=profile.cache_bytes(model),
                    gpu_busy=busy,
                    launching=launching,
                )
                runs.append(run.beside(runs[0], _interval(seconds[runs[0].model], found)) if runs else run)
        findings = []
        for model, run in zip(self.models, runs, strict=True):
            if run.cut_in_vain:
                with self.progress.stage(f"profile the {name}"):
                    findings.append(profile.cut_in_vain(self.models[0], model, run))
                if self.provider == CUDA:
                    notes.append("the profiler's times on a GPU are those of launching its kernels")
        if self.provider == CUDA:
            findings += idle_gpu(runs)
            notes += [f"{name}: {said}" for said in unknown_business(runs)]
        return Phase(name=name, detail=detail, runs=tuple(runs), findings=tuple(findings))


def bench(
    names: Sequence[Path],
    workloads: Sequence[Workload] = (),
    *,
    runs: int = 20,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> BenchReport:
    """Measure ONNX files in turns; the first is what the others are compared with.

    Args:
        names: folders that export wrote, or .onnx files, at least one.
        workloads: what to run; none is a default one.
        runs: rounds that count, behind those that warm up.
        threads: of ONNX Runtime; None is one a physical core.
        device: ``cpu`` or ``cuda``.
        progress: of the stages.

    Raises:
        UsageError: an option that cannot be used.
        MissingExtraError: no ONNX Runtime, or one that has nothing for the device.
        ModelNotFoundError, BadWeightsError, InputsDifferError: see :func:`open_models`.
        OutOfMemoryError: no room for a model and one sequence.
        OnnxRuntimeError: a model that cannot be run.
    """
    if device not in PROVIDERS:
        raise UsageError(f"--device {device}: choose one of {', '.join(PROVIDERS)}")
    for option, value in (("--runs", runs), ("--threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"{option} is {value}: it must be at least 1")
    require_onnx_runtime()
    progress = progress or Progress(quiet=True)
    with progress.stage("look at the models"):
        models = open_models(names)
    count = threads or physical_cores()
    done = Bench(models, runs, count, device, progress)
    figures = tuple(done.measure(workload) for workload in workloads or (Workload(),))
    return BenchReport(
        tool_version=version("dotresize-fx"),
        packages=package_versions(),
        machine=this_machine(count),
        device=done.device,
        provider=done.provider,
        threads=count,
        runs=runs,
        seed=SEED,
        models=tuple(
            BenchModel(name=model.name, path=str(model.path), file_bytes=model.file_bytes, cached=model.cached)
            for model in models
        ),
        workloads=figures,
    )


def _interval(before: Sequence[float], after: Sequence[float]) -> Ratio:
    value, low, high = ratio_interval(before, after, seed=SEED)
    return Ratio(value=value, low=low, high=high)
