"""The host's pinned memory, which a GPU copies from and to several times faster and beside what it computes.

It is taken in pieces of one size: torch keeps what is given back for who asks for as much, so that what one tensor
leaves serves the next, whatever their sizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

PINNED_PIECE = 32 << 20
# Pieces of a tensor that may be on their way to a GPU.
UNDER_WAY = 8


def piece_sizes(size: int) -> list[int]:
    """Bytes of each piece that so many bytes are."""
    whole, rest = divmod(size, PINNED_PIECE)
    return [PINNED_PIECE] * whole + [rest] * (rest > 0)


def pinned_size(size: int, each: int = 0) -> int:
    """What torch takes of pinned memory for so many bytes, in tensors of ``each`` or in one: a piece takes a power of
    two.
    """
    each = each or size
    return size * sum(1 << (piece - 1).bit_length() for piece in piece_sizes(each)) // max(each, 1)


def pieces_of(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Its memory in pieces, uint8; of a tensor that is not contiguous that of a copy."""
    return torch.split(tensor.detach().contiguous().reshape(-1).view(torch.uint8), PINNED_PIECE)


def to_host(part: torch.Tensor) -> torch.Tensor:
    """A piece of a GPU's memory, pinned, once the current stream came so far."""
    return _pinned(part).copy_(part, non_blocking=True)


def from_host(
    pieces: Sequence[torch.Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A GPU's tensor made of pinned ``pieces``, once its current stream came so far."""
    made = torch.empty(tuple(shape), dtype=dtype, device=device)
    for part, piece in zip(pieces_of(made), pieces, strict=True):
        part.copy_(piece, non_blocking=True)
    return made


def on_gpu(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a GPU, once its current stream came so far; some pieces at a time are pinned for it."""
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    under_way: deque[torch.cuda.Event] = deque()
    for part, piece in zip(pieces_of(made), pieces_of(tensor), strict=True):
        if len(under_way) == UNDER_WAY:
            under_way.popleft().synchronize()
        part.copy_(_pinned(piece).copy_(piece), non_blocking=True)
        under_way.append(torch.cuda.current_stream(device).record_event())
    return made


def _pinned(part: torch.Tensor) -> torch.Tensor:
    return torch.empty(len(part), dtype=torch.uint8, pin_memory=True)
