"""Progress on standard error: a line a stage with its time, where it has steps a bar, or in a log a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

# Seconds after which a log is told how far a stage is.
EVERY = 60.0


class Progress:
    """Times stages; ``seconds`` maps each stage's name to what it took, in order. Quiet ones only time.

    ``check`` runs before and after every stage and step, and may raise to end the work there.
    """

    def __init__(self, *, quiet: bool = False, check: Callable[[], None] = lambda: None) -> None:
        self.quiet = quiet
        self.check = check
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, steps: int = 0) -> Iterator[Callable[[], None]]:
        """Time a stage; yields what to call after each of its ``steps``."""
        self.check()
        started = time.perf_counter()
        bar = tqdm(
            total=steps or None,
            desc=name,
            file=sys.stderr,
            leave=False,
            disable=self.quiet or not sys.stderr.isatty(),
            bar_format="{desc} {bar:30} {n_fmt}/{total_fmt} {elapsed}" if steps else "{desc} ... {elapsed}",
        )
        told, done = started, 0

        def step() -> None:
            nonlocal told, done
            bar.update(1)
            self.check()
            done, now = done + 1, time.perf_counter()
            if bar.disable and done < steps and now - told >= EVERY:
                told = now
                self.show(f"{name}: {done} of {steps}, {now - started:.0f} s")

        try:
            yield step
        finally:
            bar.close()
        self.check()
        taken = time.perf_counter() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + taken
        self.show(f"{name:<42} {taken:8.1f} s")

    def show(self, text: str) -> None:
        """Print lines between the stages, where the stages' own are printed."""
        if not self.quiet:
            try:
                print(text, file=sys.stderr, flush=True)
            except OSError:  # its reader went away (`2>&1 | head`): the work goes on
                self.quiet = True
