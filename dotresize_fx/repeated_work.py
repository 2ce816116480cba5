"""Work on fixed tensors that is done again and again: a few times as it is, then as a CUDA graph that is replayed.

A small model's training step is thousands of short kernels, and Python launches them slower than the device computes.
"""

from __future__ import annotations

import contextlib
import gc
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from typing import Protocol

import torch

# Times before the recording, which let libraries choose their kernels and allocate.
WARM_UP = 3
# Replays that are queued at most: more would run ahead of the clock that a budget is measured with.
QUEUED = 2
Work = Callable[[], None]


class Recorder(Protocol):
    """What makes work on fixed tensors repeatable."""

    def warm_up(self, work: Work) -> None:
        """Do the work as it will be done while it is recorded."""

    def record(self, work: Work) -> Work:
        """What does the recorded work again and again; recording alone does nothing to the tensors."""


class CudaRecorder:
    """Records CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def warm_up(self, work: Work) -> None:
        """On the stream of recordings."""
        with torch.cuda.device(self._device):
            main, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
            side.wait_stream(main)
            with torch.cuda.stream(side):
                work()
            main.wait_stream(side)

    def record(self, work: Work) -> Work:
        """
        Raises:
            RuntimeError: the work has something in it that a graph cannot hold, or memory ran out.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            here, pool = torch.cuda.current_device(), torch.cuda.graph_pool_handle()
            generator = torch.cuda.default_generators[here]
            before = generator.clone_state()
            torch.cuda.synchronize()
            if torch.cuda.mem_get_info()[0] < torch.cuda.memory_reserved():
                torch.cuda.empty_cache()  # a recording takes what is free, and nothing that is cached
            try:
                # By hand, since torch's context also gives back all that was pinned, which takes seconds to pin again.
                # Other threads may copy meanwhile.
                with _uncollected(), torch.cuda.stream(_side_stream(here)):
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                    try:
                        work()
                    finally:
                        graph.capture_end()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    # Else memory is taken for a recording that never ends: none that other streams used comes back.
                    torch._C._cuda_endAllocateToPool(here, pool)
                    torch._C._cuda_releasePool(here, pool)
                with contextlib.suppress(RuntimeError):
                    torch.cuda.synchronize()  # takes an error that is still pending with it
                generator.graphsafe_set_state(before)  # else it goes on waiting for the recording's end
                raise
        queued: deque[torch.cuda.Event] = deque()

        def replay() -> None:
            with torch.cuda.device(self._device):
                if len(queued) == QUEUED:
                    queued.popleft().synchronize()
                graph.replay()
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
                queued.append(event)

        return replay


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One a device: torch has 32, and gives each to somebody else too in the end, whose copies would be recorded."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class RepeatedWork:
    """Does ``work`` each time it is called, from the fourth time on by replaying a recording of it.

    Once a recording failed the work is done as it is. ``around`` is entered while it is recorded.

    Attributes:
        note: why a recording failed, in one line; "" if none did.
    """

    def __init__(
        self,
        work: Work,
        recorder: Recorder,
        around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._work, self._recorder, self._around = work, recorder, around
        self.note = ""
        self._replay: Work | None = None
        self._warm = 0

    def __call__(self) -> None:
        if self.note:
            self._work()
        elif self._warm < WARM_UP:
            self._warm += 1
            self._recorder.warm_up(self._work)
        else:
            self._replay = self._replay or self._recorded()
            (self._replay or self._work)()

    def _recorded(self) -> Work | None:
        try:
            with self._around():
                return self._recorder.record(self._work)
        except Exception as error:  # of CUDA's, its libraries' or the program's own ops
            cause: BaseException = error
            while cause.__context__ is not None:  # ending a broken recording fails once more, and says less
                cause = cause.__context__
            said = (str(cause).strip().splitlines() or [""])[0]
            self.note = f"steps were not recorded as a CUDA graph ({type(cause).__name__}: {said})"
            return None


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected inside: an earlier recording that goes meanwhile would break the one that is made."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextlib.contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """Let CUDA round the inputs of float32 products to TF32 inside, if wanted."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if wanted:
        matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        if wanted:
            matmul.fp32_precision = before
