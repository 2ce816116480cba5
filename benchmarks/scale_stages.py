"""Where the time of scale.py's slimming goes, and which part needs the most of a GPU's memory.

    python benchmarks/scale_stages.py slim 8 --blocks 8 --rows 128 --length 2048 --memory-budget 22GiB --regions ffn

Arguments are scale.py's. Each part waits for the device before and after, so that copies that go on beside what is
computed are waited for, and a run takes longer than without. Seconds of a part are its own, those of parts that it
calls left out; what the threads do that read ahead and write is in none.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import scale
import torch
from bench import line

from dotresize_fx import compiler, probe, reader_refit, sweep
from dotresize_fx.answers import Answers
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.fx_form.reading import FxReading
from dotresize_fx.gram import GramAccumulator
from dotresize_fx.offload.held_weights import HeldWeights
from dotresize_fx.offload.lazy_tensor import LazyTensor
from dotresize_fx.passes import sweep_regions
from dotresize_fx.progress import Progress
from dotresize_fx.region_inputs import RegionInputs
from dotresize_fx.solvers import dotresize, obs
from dotresize_fx.sublayer_writer import SublayerWriter

# What is timed: (where it is looked up, its name, what it does).
PARTS: list[tuple[Any, str, str]] = [
    (compiler, "analyse", "capture and find regions"),
    (compiler, "prepare_data", "tokenise"),
    (compiler, "slim_on_device", "all that is not below"),
    (LazyTensor, "read", "read what waits elsewhere"),
    (HeldWeights, "read", "wait for weights"),
    (FxReading, "kept_activation", "put activations where they wait"),
    (FxReading, "kept", "put probes where they wait"),
    (Execution, "__init__", "prepare to run"),
    (Execution, "run", "run the models"),
    (FxGraph, "copy", "copy graphs"),
    (FxGraph, "refresh_shapes", "tell shapes anew"),
    (FxGraph, "to", "move graphs"),
    (GramAccumulator, "add", "Gram matrices"),
    (GramAccumulator, "add_up", "add Gram matrices up over ranks"),
    (obs, "eliminate", "elimination"),
    (dotresize, "sinkhorn", "transport"),
    (probe, "reader_change", "fit a probe's reader"),
    (Answers, "lost", "compare answers"),
    (reader_refit, "refit_reader", "fit a reader"),
    (reader_refit, "relative_error", "measure a reader"),
    (sweep, "best_map", "solve, but for the above"),
    (RegionInputs, "mapped", "map writers"),
    (sweep_regions, "apply_map", "fold"),
    (SublayerWriter, "put", "write a finished sublayer, or wait for the last one"),
]


# What is no stage that is shown.
BETWEEN = "between"


class Stages:
    """Seconds, calls and the most bytes allocated on the GPU by stage and part."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.calls: dict[tuple[str, str], int] = defaultdict(int)
        self.peaks: dict[tuple[str, str], int] = defaultdict(int)
        self.stage = BETWEEN
        self._inside: list[list[Any]] = []

    def watch(self, owner: Any, name: str, said: str) -> None:
        wrapped: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(wrapped)
        def timed(*given: Any, **named: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return wrapped(*given, **named)
            now = _settled()
            if self._inside:
                part, since = self._inside[-1]
                self.seconds[self.stage, part] += now - since
            self._inside.append([said, now])
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            try:
                return wrapped(*given, **named)
            finally:
                now, key = _settled(), (self.stage, said)
                self.seconds[key] += now - self._inside.pop()[1]
                self.calls[key] += 1
                if torch.cuda.is_available():
                    self.peaks[key] = max(self.peaks[key], torch.cuda.max_memory_allocated())
                if self._inside:
                    self._inside[-1][1] = now

        setattr(owner, name, timed)

    def watch_stages(self) -> None:
        """Tell the parts of one stage, as it is shown, from those of another."""
        entered = Progress.stage

        @contextmanager
        def stage(progress: Progress, name: str, *given: Any) -> Iterator[Any]:
            with entered(progress, name, *given) as step:
                self.stage = name
                try:
                    yield step
                finally:
                    self.stage = BETWEEN

        Progress.stage = stage  # type: ignore[method-assign]


def _settled() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    arguments = scale.parse()
    stages = Stages()
    for part in PARTS:
        stages.watch(*part)
    stages.watch_stages()
    found = scale.run_slim(arguments.models[0], arguments)
    print(f"{found['seconds']:.1f} s\n")
    line(["stage", "part", "seconds", "calls", "GPU GiB"])
    line(["---"] * 5)
    order = list(dict.fromkeys(stage for stage, _ in stages.seconds))
    for key in sorted(stages.seconds, key=lambda one: (order.index(one[0]), -stages.seconds[one])):
        peak = f"{stages.peaks[key] / 2**30:.1f}"
        line([*key, f"{stages.seconds[key]:.2f}", str(stages.calls[key]), peak])


if __name__ == "__main__":
    main()
