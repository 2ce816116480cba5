"""What the benchmarks measure: fidelity to the dense model, seconds and memory, with the dense model run once."""

from __future__ import annotations

import gc
import re
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from texts import Batches, Texts

from dotresize_fx.fidelity import DecoderComparison, Inputs, Run, compare_decoders
from dotresize_fx.fx_form.execution import Environment, Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind

# Sequences at once.
CPU_CALIBRATION, CPU_EVALUATION, CUDA_BATCH = 2, 1, 8


def calibration_rows(device: str) -> int:
    return CPU_CALIBRATION if device == "cpu" else CUDA_BATCH


def evaluation_rows(device: str) -> int:
    return CPU_EVALUATION if device == "cpu" else CUDA_BATCH


def runs(graph: FxGraph) -> Run:
    """The program's first output."""
    execution = Execution(graph)
    return lambda batch: execution.outputs(batch)[0]


class Fidelity:
    """Compares programs with a dense one, whose states before the head are kept: only its head is run each time."""

    def __init__(self, dense: FxGraph, measured: Mapping[str, Batches]) -> None:
        self.measured = measured
        self._dense = Execution(dense)
        head = [op for op in dense.ops if op.kind is Kind.LINEAR][-1]
        self._head = self._dense.index[dense.node(head.name)]
        self._states: dict[int, Environment] = {}
        for batch in (batch for batches in measured.values() for batch in batches):
            environment = self._dense.start(batch)
            self._dense.run(environment, 0, self._head)
            self._states[id(batch)] = environment

    def dense(self, batch: Inputs) -> torch.Tensor:
        """The dense program's first output on a batch of ``measured``."""
        result = self._dense.results[0]
        environment = dict(self._states[id(batch)])
        found: torch.Tensor = self._dense.run(environment, self._head, len(self._dense.nodes), [result])[result]
        return found

    @torch.no_grad()
    def compare(self, run: Run) -> dict[str, DecoderComparison]:
        """On every text."""
        return {name: compare_decoders(self.dense, run, batches) for name, batches in self.measured.items()}


@dataclass(frozen=True)
class Means:
    """Means over texts: excess in nats on the same and on other sources; agreement and KL on the same sources."""

    same: float
    other: float
    agreement: float
    divergence: float


def means(found: Mapping[str, DecoderComparison], texts: Texts) -> Means:
    same = [found[name] for name in texts.same]
    return Means(
        _mean([one.excess for one in same]),
        _mean([found[name].excess for name in texts.other]),
        _mean([one.top1_agreement for one in same]),
        _mean([one.kl_to_dense for one in same]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


@dataclass
class Spent:
    """``peak_gib``: the most that CUDA had allocated in between, dense model and batches included; on the CPU the
    most of the process's memory that was resident.
    """

    seconds: float = 0.0
    peak_gib: float = 0.0


@contextmanager
def spending(device: str) -> Iterator[Spent]:
    """Time and peak memory of what is done inside; what earlier work left unused is freed first."""
    free_memory(device)
    if device == "cpu":
        with suppress(OSError):  # Linux forgets the highest so far
            Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    spent, started = Spent(), time.perf_counter()
    try:
        yield spent
    finally:
        if device != "cpu":
            torch.cuda.synchronize()
        spent.seconds = time.perf_counter() - started
        spent.peak_gib = (_peak_resident() if device == "cpu" else torch.cuda.max_memory_allocated()) / 2**30


def free_memory(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def _peak_resident() -> int:
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forward_seconds(graph: FxGraph, batches: Batches, device: str) -> float:
    """The program's forward pass over the batches, after one batch to warm up."""
    run = runs(graph)
    run(batches[0])
    with spending(device) as spent:
        for batch in batches:
            run(batch)
    return spent.seconds
