"""Where calibration and solving run."""

from __future__ import annotations

import torch

from dotresize_fx.errors import UsageError
from dotresize_fx.options import Options


def compute_device(options: Options) -> str:
    """``cpu`` or ``cuda``; of several, the one that torch takes for the current one.

    Raises:
        UsageError: CUDA was asked for and torch has none.
    """
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise UsageError("--device cuda: this torch sees no CUDA device; use --device cpu")
    return "cuda" if options.device != "cpu" and available else "cpu"
