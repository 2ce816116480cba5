"""What ``bench`` measured, typed: the source of its JSON, its page and its tables.

Sizes are bytes, times seconds. MACs count a multiply with its add as one; None is what was not measured.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dotresize_fx.report.contents import Latency, Machine, plain_json

BENCH_SCHEMA_VERSION = 1
#: A cut in MACs beyond the first counts as one; a latency whose ratio may reach the second was not cut.
MACS_CUT, NO_LATENCY_CUT = 0.95, 0.97
#: A GPU that is busy for less of a run waits for its kernels to be launched.
GPU_BUSY = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchModel:
    """``file_bytes`` is the .onnx file with its external data. ``cached``: it takes and gives a KV cache."""

    name: str
    path: str
    file_bytes: int
    cached: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """Median latency over the first model's, and the ends of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFigures:
    """One model in one phase. ``macs`` are of one run, ``weight_bytes`` what it reads of the weights (each once, of an
    embedding the rows picked), ``cache_bytes`` keys and values in and out; all ratios are to the first model's.

    ``gpu_busy`` is the share of the time that kernels run on a GPU, ``launching`` that its nodes take to be launched.
    """

    model: str
    latency: Latency
    tokens_per_run: int | None
    macs: int | None
    weight_bytes: int | None = None
    cache_bytes: int | None = None
    ratio: Ratio | None = None
    macs_ratio: float | None = None
    bytes_ratio: float | None = None
    gpu_busy: float | None = None
    launching: float | None = None

    def beside(self, first: RunFigures, ratio: Ratio) -> RunFigures:
        """With the ratios to the first model's figures; ``ratio`` is that of the latencies."""
        return dataclasses.replace(
            self,
            ratio=ratio,
            macs_ratio=None if not first.macs or self.macs is None else self.macs / first.macs,
            bytes_ratio=None
            if not first.bytes_moved or self.bytes_moved is None
            else self.bytes_moved / first.bytes_moved,
        )

    @property
    def bytes_moved(self) -> int | None:
        """Weights and cache; what is between the nodes is not counted."""
        return None if self.weight_bytes is None else self.weight_bytes + (self.cache_bytes or 0)

    @property
    def gigabytes_per_second(self) -> float | None:
        return None if self.bytes_moved is None else self.bytes_moved / self.latency.median / 1e9

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.tokens_per_run is None else self.tokens_per_run / self.latency.median

    @property
    def gflops(self) -> float | None:
        """Achieved, in 10^9 operations a second: two a MAC."""
        return None if self.macs is None else 2 * self.macs / self.latency.median / 1e9

    @property
    def cut_in_vain(self) -> bool:
        """Whether MACs fell and latency did not, or not surely."""
        return (
            self.ratio is not None
            and self.macs_ratio is not None
            and self.macs_ratio < MACS_CUT
            and self.ratio.high >= NO_LATENCY_CUT
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """Nodes under one ``label`` in the first model and in another: seconds and MACs a run.

    ``eaten`` is how much longer they took than if their time had fallen as all MACs did.
    """

    label: str
    before: float
    after: float
    before_macs: int
    after_macs: int
    eaten: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Why a cut in MACs does not show in ``model``. ``losses``: where the time goes that it should have saved, by kind
    of op, region and layer; none where the text says it all.
    """

    model: str
    text: str
    losses: dict[str, tuple[Loss, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """The prompt, or an output token. ``detail`` says what one run is."""

    name: str
    detail: str
    runs: tuple[RunFigures, ...]
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """A model's process at its peak; ``device_bytes`` is what it took of the device beside CUDA's own context."""

    model: str
    rss_bytes: int | None
    device_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadFigures:
    """One workload. ``batch`` is what was run, which ``notes`` explain where it is not what was asked for."""

    prompt: int
    decode: int
    batch: int
    phases: tuple[Phase, ...]
    peaks: tuple[Peak, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchReport:
    """``models[0]`` is what the others are compared with. ``device`` is cpu, or the GPU's name."""

    tool_version: str
    packages: dict[str, str]
    machine: Machine
    device: str
    provider: str
    threads: int
    runs: int
    seed: int
    models: tuple[BenchModel, ...]
    workloads: tuple[WorkloadFigures, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields, ``schema_version``, and of every run what is derived from them."""
        content: dict[str, Any] = {"schema_version": BENCH_SCHEMA_VERSION, **dataclasses.asdict(self)}
        for workload, entry in zip(self.workloads, content["workloads"], strict=True):
            for phase, written in zip(workload.phases, entry["phases"], strict=True):
                for run, figures in zip(phase.runs, written["runs"], strict=True):
                    derived = ("tokens_per_second", "gflops", "bytes_moved", "gigabytes_per_second", "cut_in_vain")
                    figures.update({name: getattr(run, name) for name in derived})
        plain: dict[str, Any] = plain_json(content)
        return plain
