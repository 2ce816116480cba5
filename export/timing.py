"""How long ONNX files take, measured in turns (A B A B) so that what else the machine does meets all alike.

Each has a process of its own, so that each has its own peak of memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dotresize_fx.export.onnx_runtime import store_arrays
from dotresize_fx.export.onnx_session import CPU, physical_cores, require_onnx_runtime
from dotresize_fx.export.runtime_child import RuntimeChild
from dotresize_fx.report.contents import Latency

Array = np.ndarray[Any, Any]
WARM_UP = 3
FEWEST_RUNS = 5


@dataclass(frozen=True)
class Conditions:
    """What all runs of a measurement share; ``batch`` and ``length`` are what was fed, for the report."""

    threads: int
    provider: str
    batch: int | None
    length: int | None


@dataclass(frozen=True)
class Turns:
    """Of one model, by round: seconds of the prompt, and of each token behind it, and peaks of its memory."""

    prompt: list[float]
    tokens: list[list[float]]
    peak_rss_bytes: int | None
    device_bytes: int | None


def measure_latency(
    models: Mapping[str, Path],
    inputs: Mapping[str, Array],
    *,
    runs: int = 30,
    warmup: int = WARM_UP,
    threads: int | None = None,
    provider: str = CPU,
    budget: float = 60.0,
    work: Path | None = None,
    own: Mapping[str, Mapping[str, Array]] | None = None,
) -> dict[str, Latency]:
    """Time ``models`` on the same ``inputs`` in turns, all sessions open; inputs and outputs stay on the device.

    ``own`` are inputs of one model alone, by its name: a cache whose heads are no longer of one size.
    ``threads`` defaults to one a physical core. Once ``budget`` seconds are spent no further round starts,
    except that every model runs 5 times at least (``runs`` times where that is fewer). ``work`` is for the
    inputs' files (default: the system's temporary folder). Caches are empty. Raises as :func:`compare_outputs` does.
    """
    require_onnx_runtime()
    if not models or runs < 1:
        raise ValueError("nothing to measure: no model, or no run")
    count = threads or physical_cores()
    with ExitStack() as stack:
        children = {}
        for name, path in models.items():
            child = children[name] = stack.enter_context(RuntimeChild(work))
            given = {**inputs, **(own or {}).get(name, {})}
            store_arrays(child.folder / "inputs.npz", list(given.values()))
            fed = {"file": "inputs.npz", "inputs": list(given)}
            child.ask("open", model=str(Path(path).resolve()), threads=count, provider=provider, **fed)
        turns = take_turns(children, runs=runs, warmup=warmup, budget=budget)
    shape: tuple[int, ...] = next((array.shape for array in inputs.values()), ())
    batch, length = shape[0] if shape else None, shape[1] if len(shape) > 1 else None
    where = Conditions(count, provider, batch, length)
    return {name: latency(found.prompt, where, found.peak_rss_bytes) for name, found in turns.items()}


def take_turns(
    children: Mapping[str, RuntimeChild],
    *,
    runs: int,
    warmup: int,
    tokens: int = 0,
    budget: float | None = None,
    step: Callable[[], None] = lambda: None,
) -> dict[str, Turns]:
    """Let every child, each with a model open, run once a round: the prompt, then ``tokens`` runs of one token.

    ``step`` is called once a round that counts.
    """
    started = time.monotonic()

    def spent(part: float) -> bool:
        return budget is not None and time.monotonic() - started > part * budget

    for index in range(warmup):
        if index and spent(0.2):
            break
        for child in children.values():
            child.ask("run", tokens=min(tokens, 2))
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in children}
    for index in range(runs):
        if index >= FEWEST_RUNS and spent(1.0):
            break
        for name, child in children.items():
            answers[name].append(child.ask("run", tokens=tokens))
        step()
    return {
        name: Turns(
            prompt=[answer["prompt"] for answer in found],
            tokens=[answer["tokens"] for answer in found],
            peak_rss_bytes=found[-1]["peak_rss_bytes"],
            device_bytes=found[-1]["device_bytes"],
        )
        for name, found in answers.items()
    }


def latency(seconds: Sequence[float], where: Conditions, peak_rss_bytes: int | None = None) -> Latency:
    """Median, quartiles and ends of a model's runs."""
    low, middle, high = (float(value) for value in np.percentile(seconds, (25, 50, 75)))
    return Latency(
        median=middle,
        min=min(seconds),
        max=max(seconds),
        p25=low,
        p75=high,
        runs=len(seconds),
        batch=where.batch,
        length=where.length,
        threads=where.threads,
        provider=where.provider,
        peak_rss_bytes=peak_rss_bytes,
    )


def ratio_interval(
    before: Sequence[float], after: Sequence[float], *, draws: int = 4000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """(median of ``after`` / median of ``before``, and the ends of its bootstrap interval).

    Rounds are drawn as pairs, since a round's two runs share what the machine did meanwhile (percentile bootstrap,
    Efron and Tibshirani 1993, section 13.3). Raises ValueError for sequences of unequal length or without elements.
    """
    first, second = np.asarray(before), np.asarray(after)
    if first.shape != second.shape or not first.size:
        raise ValueError("a ratio needs as many runs of one side as of the other, at least one")
    drawn = np.random.default_rng(seed).integers(0, first.size, (draws, first.size))
    ratios = np.median(second[drawn], axis=1) / np.median(first[drawn], axis=1)
    low, high = np.quantile(ratios, ((1 - level) / 2, (1 + level) / 2))
    return float(np.median(second) / np.median(first)), float(low), float(high)
