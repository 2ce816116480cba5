"""Where calibration and solving run."""

from __future__ import annotations

import torch

from dotresize_fx.errors import UsageError
from dotresize_fx.memory import Memory
from dotresize_fx.offload.pinned_memory import pinned_size
from dotresize_fx.options import Options

# Weights that a GPU holds of those that stay in files: two blocks of a large model, and no more than it has room for.
HELD, HELD_SHARE = 2 << 30, 0.25
# Of the host's memory that pinned streams may take where weights stay in files.
PINNED_SHARE = 0.75


def compute_device(options: Options) -> str:
    """``cpu`` or ``cuda``; of several, the one that torch takes for the current one.

    Raises:
        UsageError: CUDA was asked for and torch has none.
    """
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise UsageError("--device cuda: this torch sees no CUDA device; use --device cpu")
    return "cuda" if options.device != "cpu" and available else "cpu"


def stream_place(memory: Memory, streams: int, device: str, batch: int) -> str:
    """Where this many bytes of the sweep's streams had better wait, of what :class:`stored_tensors.Spool` knows;
    ``batch``: those of one stream of one batch.
    """
    if device == "cpu":
        return "files" if memory.has_no_room_for_streams(streams) else "device"
    if memory.fits(streams, HELD_SHARE, free_on_gpu(device)):
        return "device"
    return "pinned" if memory.fits(pinned_size(streams, batch), PINNED_SHARE) else "files"


def computes_in_half(options: Options, stored: torch.dtype | None, device: str) -> bool:
    """Whether products of activations are bfloat16's: where asked for, or on a GPU of a model that is stored so."""
    if options.compute_dtype is not None:
        return options.compute_dtype == "bfloat16"
    return device != "cpu" and stored is torch.bfloat16


def free_on_gpu(device: str) -> int | None:
    """Bytes; None of a CPU."""
    return None if device == "cpu" else int(torch.cuda.mem_get_info()[0])


def give_back() -> None:
    """What torch keeps of memory that is free again, a GPU's and pinned memory of the host."""
    torch.cuda.empty_cache()
    empty = getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()


def held_bytes(memory: Memory, device: str) -> int:
    """How much of what is read from files again and again may stay on the device; on a CPU they are as near."""
    free = free_on_gpu(device)
    return 0 if free is None else min(HELD, int(HELD_SHARE * min(free, memory.budget or free)))
