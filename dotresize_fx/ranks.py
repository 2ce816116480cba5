"""Processes that work on one model together, where ``torch.distributed`` is initialised; one process else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dotresize_fx.errors import RanksError
from dotresize_fx.launched import Launched

LOOK_EVERY = 1e-4  # seconds


class Ranks:
    """``rank`` of ``count``, (0, 1) where it is to work ``alone``. Then every method leaves what it is given as it is.

    Others are waited for in Python, where signals are heard: nothing else ends the wait for a rank that is gone.
    Together, every method raises RanksError when the connection to another rank breaks.
    """

    def __init__(self, *, alone: bool = False) -> None:
        together = not alone and dist.is_available() and dist.is_initialized() and not Launched.others_left
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    def mine(self, count: int) -> range:
        """Which of so many batches this rank runs: every so many-th."""
        return range(self.rank, count, self.count)

    def share_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Rank 0's values for everyone, in place."""
        if self.count > 1:
            for tensor in tensors:
                # Bytes in the order of the indices: no two ranks need the same strides, and backends lack some types.
                whole = tensor.detach().contiguous()
                self._wait(lambda part: dist.broadcast(part, 0, async_op=True), whole.flatten().view(torch.uint8))
                if whole.data_ptr() != tensor.data_ptr():
                    tensor.detach().copy_(whole)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.count > 1:
            self._wait(lambda part: dist.all_reduce(part, async_op=True), tensor)
        return tensor

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest number over ranks, in place."""
        if self.count > 1:
            self._wait(lambda part: dist.all_reduce(part, dist.ReduceOp.MAX, async_op=True), tensor)
        return tensor

    def first_matrix(self, matrix: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        """Rank 0's complex128 matrix, or None where it has none."""
        if self.count == 1:
            return matrix
        sizes = [0, 0] if matrix is None or self.rank else list(matrix.shape)
        self.share_first([shape := torch.tensor(sizes, device=device)])
        if not shape.any():
            return None
        given = self.rank == 0 and matrix is not None
        found = matrix if given and matrix is not None else torch.empty(*shape, dtype=torch.complex128, device=device)
        self.share_first([found])
        return found

    def sum_gradients(self, parameters: Sequence[torch.Tensor]) -> None:
        """Gradients summed over ranks; a rank that had nothing to do counts as zero."""
        if self.count == 1:
            return
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.sum(torch.cat([part.flatten() for part in parts]))
        for parameter, part in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def first(self, number: float, device: torch.device) -> float:
        """Rank 0's number."""
        if self.count == 1:
            return number
        shared = torch.tensor([number], dtype=torch.float64, device=device)
        self.share_first([shared])
        return float(shared)

    def _wait(self, start: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> None:
        """Start a collective over ``tensor`` and wait until it is done."""
        try:
            work = start(tensor)
            while not work.is_completed():
                time.sleep(LOOK_EVERY)
            work.wait()
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
            raise RanksError(f"the connection to another process broke: {said}") from error
