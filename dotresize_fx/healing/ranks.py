"""Processes that train one set of weights together, where ``torch.distributed`` is initialised; one process else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist


class Ranks:
    """``rank`` of ``count``. Alone, every method leaves what it is given as it is."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    def share_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Rank 0's values for everyone, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

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
        dist.broadcast(shared, 0)
        return float(shared)
