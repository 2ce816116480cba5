"""Weights that were read from files of late, and those that are read next, on a device that is far from the files."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from dotresize_fx.offload.lazy_tensor import LazyTensor
from dotresize_fx.offload.side_copy import received

# Threads that read ahead: one copies no faster into pinned memory than a GPU runs few tokens.
READERS = 3
# A tensor, and the dtype that it is held in.
Wanted = tuple[LazyTensor, torch.dtype]


@dataclass
class _Arriving:
    """What another thread reads; ``event`` is when a GPU has it."""

    lazy: LazyTensor
    size: int
    numbers: Future[tuple[torch.Tensor, torch.cuda.Event | None]]

    def arrived(self) -> torch.Tensor:
        tensor, event = self.numbers.result()
        return tensor if event is None else received(tensor, event)


class HeldWeights:
    """``limit`` bytes of them at most: what has been held for longest goes first, asked for again or not.

    All batches run through a block one after the other, and each would fetch its weights anew. Other threads read what
    is told to come next, and copy it beside what is computed.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit, self._size = limit, 0
        self._held: dict[tuple[int, torch.dtype], _Arriving] = {}
        self._reader = ThreadPoolExecutor(READERS, "read-ahead")
        self._copying: torch.cuda.Stream | None = None

    def has_room(self, size: int) -> bool:
        """Whether so many bytes may be held, as much again beside them."""
        return size <= self.limit // 2

    def holds(self, lazy: LazyTensor, dtype: torch.dtype) -> bool:
        """Whether it is held in ``dtype``, or on its way."""
        return (id(lazy), dtype) in self._held

    def read(self, lazy: LazyTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Its numbers, in ``dtype``, read now or held.

        Raises:
            BadWeightsError: what is read is broken.
        """
        dtype = dtype or lazy.dtype
        if not self.has_room(lazy.numel() * dtype.itemsize):
            return lazy.read(dtype)
        arriving = self._asked((lazy, dtype))
        try:
            return arriving.arrived()
        except Exception:  # perhaps of a moment that is over
            self._drop((id(lazy), dtype))
            return lazy.read(dtype)

    def read_ahead(self, following: Iterable[Wanted]) -> None:
        """Read of these, in other threads, what is not held yet."""
        for wanted in following:
            self._asked(wanted)

    def forget(self) -> None:
        """Hold nothing and read nothing ahead, where memory is needed for something else."""
        for key in list(self._held):
            self._drop(key)

    def _drop(self, key: tuple[int, torch.dtype]) -> None:
        arriving = self._held.pop(key)
        arriving.numbers.cancel()  # if it has not begun
        self._size -= arriving.size

    def _asked(self, wanted: Wanted) -> _Arriving:
        lazy, dtype = wanted
        key = id(lazy), dtype
        arriving = self._held.get(key)
        if arriving is not None:
            return arriving
        size = lazy.numel() * dtype.itemsize
        gpu = None
        if lazy.device.type == "cuda":
            gpu = torch.cuda.current_device()  # a thread has its own
            self._copying = self._copying or torch.cuda.Stream(gpu)  # type: ignore[no-untyped-call]
        arriving = self._held[key] = _Arriving(lazy, size, self._reader.submit(self._fetch, lazy, dtype, gpu))
        self._size += size
        while self._size > self.limit and len(self._held) > 1:
            self._drop(next(iter(self._held)))
        return arriving

    def _fetch(
        self, lazy: LazyTensor, dtype: torch.dtype, gpu: int | None
    ) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        if gpu is None:
            return lazy.read(dtype), None
        assert self._copying is not None
        with torch.cuda.device(gpu), torch.cuda.stream(self._copying):
            tensor = lazy.read(dtype)
            return tensor, self._copying.record_event()
