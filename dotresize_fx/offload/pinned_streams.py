"""Activations that wait in the host's pinned memory, copied both ways beside what the GPU computes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterable, Sequence

import torch

from dotresize_fx.memory import available_memory
from dotresize_fx.offload.lazy_tensor import LazyTensor
from dotresize_fx.offload.pinned_memory import from_host, piece_sizes, pieces_of, pinned_size, to_host
from dotresize_fx.offload.side_copy import received

# Bytes that may be on their way to the host: the GPU keeps them until they are there.
ON_THE_WAY = 1 << 30
# Batches that may be queued behind the one that the GPU works at.
AHEAD = 2

# Of a batch what is sure to wait at once: the dense model's stream, the slim one's, and what a reader should put out.
STREAMS_AT_ONCE = 3
# Free memory of the host below which no more is pinned before it is needed.
LEFT = 1 << 30
# Threads that make the host's memory pinned: one takes 0.7 s a GiB.
PINNING_THREADS = 8


def _pin_in_parallel() -> None:
    """Have torch pin memory in several threads, where it can, beside what the user told it."""
    told = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    settle = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if settle is None or "pinned" in told:
        return
    own = f"pinned_use_cuda_host_register:True,pinned_num_register_threads:{PINNING_THREADS}"
    settle(f"{told},{own}" if told else own)


class _Waiting:
    """A tensor's numbers on the host, in pieces, which are there once ``there`` happened."""

    def __init__(
        self,
        pieces: Sequence[torch.Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        there: torch.cuda.Event,
        back: torch.cuda.Stream,
    ) -> None:
        self._pieces, self._shape, self._dtype, self._there, self._back = pieces, shape, dtype, there, back
        self._ahead: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def start(self) -> None:
        """Copy them to the GPU beside what it computes, for who takes them next."""
        if self._ahead is None:
            with torch.cuda.stream(self._back):
                self._back.wait_event(self._there)
                tensor = from_host(self._pieces, self._shape, self._dtype, self._back.device)
                self._ahead = tensor, self._back.record_event()

    def drop(self) -> None:
        """Nobody takes them now."""
        self._ahead = None

    def take(self) -> torch.Tensor:
        self.start()
        assert self._ahead is not None
        (tensor, event), self._ahead = self._ahead, None
        return received(tensor, event)


class PinnedTensor(LazyTensor):
    """A tensor whose numbers wait there."""

    waiting: _Waiting


class PinnedStreams:
    """Of the current GPU."""

    def __init__(self) -> None:
        _pin_in_parallel()
        self._leaving_on, self._coming_on = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._leaving: deque[tuple[torch.cuda.Event, int]] = deque()
        self._size = 0
        self._worked: deque[torch.cuda.Event] = deque()
        self._pinning: threading.Thread | None = None
        self._enough = threading.Event()

    def expect(self, sizes: Iterable[int]) -> None:
        """Pin memory for streams of which a batch has so many bytes, beside what is done until they come."""
        self.begin()
        enough = self._enough = threading.Event()
        pieces = [piece for size in sizes for piece in piece_sizes(size) * STREAMS_AT_ONCE]
        gpu = torch.cuda.current_device()

        def pin() -> None:
            pinned = []
            # Where memory is short, what needs it says so.
            with torch.cuda.device(gpu), contextlib.suppress(RuntimeError):
                for size in pieces:
                    free = available_memory()
                    short = free is not None and free < pinned_size(size) + LEFT
                    if short or enough.is_set() or not threading.main_thread().is_alive():
                        break
                    pinned.append(torch.empty(size, dtype=torch.uint8, pin_memory=True))
            # Torch keeps them pinned for who asks for as much.

        self._pinning = threading.Thread(target=pin, name="pin")
        self._pinning.start()

    def begin(self) -> None:
        """They come: no more is pinned before."""
        if self._pinning is not None:
            self._enough.set()
            self._pinning.join()
            self._pinning = None

    def put(self, tensor: torch.Tensor) -> PinnedTensor:
        """The same numbers, on the same device, once they are needed."""
        while self._size + tensor.nbytes > ON_THE_WAY and self._leaving:
            event, size = self._leaving.popleft()
            event.synchronize()
            self._size -= size
        parts = pieces_of(tensor)
        self._leaving_on.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._leaving_on):
            pieces = [to_host(part) for part in parts]
            event = self._leaving_on.record_event()
        parts[0].record_stream(self._leaving_on)
        self._leaving.append((event, tensor.nbytes))
        self._size += tensor.nbytes
        waiting = _Waiting(pieces, tensor.shape, tensor.dtype, event, self._coming_on)
        made = PinnedTensor(waiting.take, tuple(tensor.shape), tensor.dtype, tensor.device)
        made.waiting = waiting
        return made

    def worked(self) -> None:
        """One more batch was queued: wait for the last but AHEAD, whose memory no other one has until then."""
        self._worked.append(torch.cuda.current_stream().record_event())
        if len(self._worked) > AHEAD:
            self._worked.popleft().synchronize()
