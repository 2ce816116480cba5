"""One phase of a benchmark's workload, looked at node by node: what a run multiplies and moves, what a GPU does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from dotresize_fx.errors import OnnxRuntimeError, OutOfMemoryError
from dotresize_fx.export.bench_model import GivenModel
from dotresize_fx.export.bytes_moved import cache_bytes
from dotresize_fx.export.latency_losses import latency_losses
from dotresize_fx.export.node_profile import Profile, ProfiledNode
from dotresize_fx.export.onnx_session import CUDA
from dotresize_fx.export.runtime_child import RuntimeChild
from dotresize_fx.report.bench_contents import GPU_BUSY, Finding, RunFigures

PROFILED_RUNS = 5


@dataclass(frozen=True)
class Counted:
    """A run of a model by its file's nodes; what is not known is None, and ``notes`` say why."""

    nodes: list[ProfiledNode]
    macs: int | None
    weight_bytes: int | None
    notes: tuple[str, ...] = ()


class PhaseProfile:
    """Runs of ``length`` tokens behind ``past`` cached ones, in processes of their own that profile."""

    def __init__(self, *, threads: int, provider: str, batch: int, length: int, past: int) -> None:
        self.threads, self.provider = threads, provider
        self.batch, self.length, self.past = batch, length, past
        self.counted = cache(self._counted)
        self.profiled = cache(self._profiled)

    def cache_bytes(self, model: GivenModel) -> int | None:
        return cache_bytes(model.plans, self.batch, self.length, self.past) if model.cached else None

    def business(self, model: GivenModel, median: float) -> tuple[float | None, float | None]:
        """The share that kernels run on the GPU of a run that takes ``median`` seconds unprofiled, by the profiler or
        else the driver, and the share that nodes are launched of a profiled one; None where that is not known.
        """
        if self.provider != CUDA:
            return None, None
        try:
            found = self.profiled(model)
            busy = self._busy(model) if found.kernels is None else min(1.0, found.kernels / median)
        except (OnnxRuntimeError, OutOfMemoryError):  # it was timed; without a profile that is all there is
            return None, None
        return busy, None if found.launching is None else min(1.0, found.launching)

    def _busy(self, model: GivenModel) -> float | None:
        """By the driver, which sees kernels where ONNX Runtime's profiler was built without eyes for them."""
        with RuntimeChild() as child:
            request = request_for(model, self.threads, self.provider, self.batch, self.length)
            found: float | None = child.ask("busy", **request, past=self.past)["busy"]
            return found

    def fastest(self, model: GivenModel, runs: int) -> float:
        """Seconds of a run, each of its nodes as in the fastest of so many."""
        return sum(node.seconds for node in self._profile(model, runs=runs, optimised=True, fastest=True).nodes)

    def cut_in_vain(self, first: GivenModel, model: GivenModel, run: RunFigures) -> Finding:
        """Why ``model``, with fewer MACs than the first, is not faster."""
        sides = [(self.profiled(side).nodes, self.counted(side).nodes, side.modules) for side in (first, model)]
        return Finding(model=model.name, text=_in_vain(run), losses=latency_losses(sides[0], sides[1]))

    def _counted(self, model: GivenModel) -> Counted:
        try:
            nodes = self._profile(model, runs=1, optimised=False).nodes
        except (OnnxRuntimeError, OutOfMemoryError) as error:
            why = f"it does not run without ONNX Runtime's fusions ({error})"
            return Counted([], None, None, (f"MACs and bytes of {model.name} are not counted: {why}",))
        macs, size = sum(node.macs or 0 for node in nodes), model.weights.read(nodes)
        unknown = sorted({node.op for node in nodes if node.macs is None})
        notes = [f"MACs of {model.name} lack those of {', '.join(unknown)}"] if unknown else []
        if size is None:
            notes.append(f"bytes of {model.name} are not counted: a Gather without a name does not tell its rows")
        return Counted(nodes, macs, size, tuple(notes))

    def _profiled(self, model: GivenModel) -> Profile:
        return self._profile(model, runs=PROFILED_RUNS, optimised=True)

    def _profile(self, model: GivenModel, **how: Any) -> Profile:
        with RuntimeChild() as child:
            request = request_for(model, self.threads, self.provider, self.batch, self.length)
            answer = child.ask("profile", **request, past=self.past, equations=model.equations, **how)
        return Profile.from_json({name: answer[name] for name in ("nodes", "kernels", "launching")})


def request_for(model: GivenModel, threads: int, provider: str, batch: int, length: int) -> dict[str, Any]:
    """What a runtime process is asked to open."""
    return {
        "model": str(model.path.resolve()),
        "threads": threads,
        "provider": provider,
        "plans": [plan.as_json() for plan in model.plans],
        "batch": batch,
        "length": length,
    }


def idle_gpu(runs: Iterable[RunFigures]) -> list[Finding]:
    """Where the GPU waits to be given something to do."""
    return [
        Finding(
            model=run.model,
            text=f"the GPU is busy for {run.gpu_busy:.0%} of a run of {run.model}: launching kernels dominates there, "
            "and what a cut takes off their work cannot show",
            losses={},
        )
        for run in runs
        if run.gpu_busy is not None and run.gpu_busy < GPU_BUSY
    ]


def unknown_business(runs: Iterable[RunFigures]) -> list[str]:
    """What is to be said where the profiler saw no kernels."""
    unknown = [run for run in runs if run.gpu_busy is None]
    shares = ", ".join(f"{run.launching:.0%} of a run of {run.model}" for run in unknown if run.launching is not None)
    said = f"; launching nodes, and waiting for room to, took {shares}" if shares else ""
    return [f"GPU busy: unknown, neither ONNX Runtime's profiler nor the driver tells{said}"] if unknown else []


def _in_vain(run: RunFigures) -> str:
    assert run.ratio is not None
    assert run.macs_ratio is not None
    moved = run.bytes_ratio
    fewer = "" if moved is None or moved >= 1 else f", moves {100 * (1 - moved):.1f} % fewer bytes"
    return (
        f"{run.model} has {100 * (1 - run.macs_ratio):.1f} % fewer MACs{fewer} and is not surely faster: its latency "
        f"is {run.ratio.value:.3f} of the first model's, 95 % interval {run.ratio.low:.3f} to {run.ratio.high:.3f}"
    )
