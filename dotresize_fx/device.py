"""Where calibration and solving run."""

from __future__ import annotations

import torch

from dotresize_fx.errors import UsageError
from dotresize_fx.options import Options

# Weights that a GPU holds of those that stay in files: two blocks of a large model, and no more than it has room for.
HELD, HELD_SHARE = 4 << 30, 0.25


def compute_device(options: Options) -> str:
    """``cpu`` or ``cuda``; of several, the one that torch takes for the current one.

    Raises:
        UsageError: CUDA was asked for and torch has none.
    """
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise UsageError("--device cuda: this torch sees no CUDA device; use --device cpu")
    return "cuda" if options.device != "cpu" and available else "cpu"


def held_bytes(device: str) -> int:
    """How much of what is read from files again and again may stay on the device; on a CPU they are as near."""
    return 0 if device == "cpu" else min(HELD, int(HELD_SHARE * torch.cuda.mem_get_info()[0]))
