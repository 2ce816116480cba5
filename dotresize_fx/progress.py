"""Progress on standard error: one line a stage with its time, and a bar where a stage has steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


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
        try:
            yield lambda: self._step(bar)
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

    def _step(self, bar: tqdm[None]) -> None:
        bar.update(1)
        self.check()
