"""Keep the process's memory near what is in use."""

from __future__ import annotations

import ctypes
import sys

# glibc's own bound rises with every large block that is freed, and what then comes from the heap is scattered over it
# and not given back: a run grows to nearly twice what it holds.
LARGE_BLOCK = 4 << 20
_M_MMAP_THRESHOLD = -3


def give_large_blocks_back() -> None:
    """Let freed blocks of LARGE_BLOCK bytes and more go back to the system at once; only glibc needs to be told."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
