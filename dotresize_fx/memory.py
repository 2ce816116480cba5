"""The memory that there is, and a process that stays near what it has in use."""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from dotresize_fx.errors import UsageError

# glibc's own bound rises with every large block that is freed, and what then comes from the heap is scattered over it
# and not given back: a run grows to nearly twice what it holds.
LARGE_BLOCK = 4 << 20
# Under a budget. What of 1 to 4 MiB is left in the heap comes to some 70 MiB of holes; without them a run takes a tenth
# longer, since each block is cleared anew.
LARGE_BLOCK_IN_BUDGET = 1 << 20
_M_MMAP_THRESHOLD = -3


def give_large_blocks_back(size: int = LARGE_BLOCK) -> None:
    """Let freed blocks of ``size`` bytes and more go back to the system at once; only glibc needs to be told."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, size)


# Weights in float32 may take this share of what there is: the slim model, its ONNX and a block's statistics come too.
WEIGHTS_SHARE = 0.3
STREAMS_SHARE = 0.2
# Streams that cannot wait in files: without them fidelity is lost.
KEPT_STREAMS_SHARE = 0.5
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
LEAST_BUDGET = 64 << 20


@dataclass(frozen=True)
class Memory:
    """``budget`` is how many bytes the process may take for itself, files mapped into it not counted; None is what is
    free.

    ``lazy`` False: weights are read at once whatever there is, since what is asked for takes them all. ``gpu``: how
    many bytes there are where they are computed with, if not here.
    """

    budget: int | None = None
    lazy: bool = True
    gpu: int | None = None

    def is_short_of(self, weights: int) -> bool:
        """Whether this many bytes of weights had better stay in their files."""
        return self.lazy and not (self.fits(weights, WEIGHTS_SHARE) and self.fits(weights, WEIGHTS_SHARE, self.gpu))

    def has_no_room_for_streams(self, activations: int) -> bool:
        """Whether activations of this many bytes, both models' on the calibration text, had better wait in files."""
        return not self.fits(activations, STREAMS_SHARE)

    def has_room_for_kept_streams(self, activations: int, there: int | None = None) -> bool:
        """Whether activations of this many bytes may stay where they are computed, ``there`` the bytes that are free
        there (None: the process's memory).
        """
        return self.fits(activations, KEPT_STREAMS_SHARE, there)

    def fits(self, size: int, share: float, there: int | None = None) -> bool:
        """Whether so many bytes are at most this share of the budget, and of the bytes ``there``; without either, of
        what is free here.
        """
        bounds = [bound for bound in (self.budget, there) if bound is not None]
        if not bounds and (free := available_memory()) is not None:
            bounds = [free]
        return all(size <= share * bound for bound in bounds)


WHAT_IS_FREE = Memory()


def read_size(text: str) -> int:
    """Bytes of "4GiB", "512MiB", "800MB" or "1.5 GiB".

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", text.strip().upper())
    if found is None:
        raise UsageError(f"--memory-budget {text}: say a size such as 4GiB or 512MiB")
    number, unit, binary = found.groups()
    return int(float(number) * (2 ** _UNITS[unit] if binary else 1000 ** (_UNITS[unit] // 10)))


def show_size(size: float) -> str:
    """As "1.5 GiB" or "512 MiB"."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def available_memory() -> int | None:
    """Bytes that a process can still take, after its control group's bound where there is one; None if not told."""
    found = _number(Path("/proc/meminfo"), r"MemAvailable:\s+(\d+)")
    available = None if found is None else found * 1024
    bound = _number(Path("/sys/fs/cgroup/memory.max"), r"(\d+)")
    used = _number(Path("/sys/fs/cgroup/memory.stat"), r"anon (\d+)")
    if available is None or bound is None or used is None:
        return available
    return max(0, min(available, bound - used))


def _number(file: Path, pattern: str) -> int | None:
    try:
        found = re.search(pattern, file.read_text(encoding="ascii", errors="replace"))
    except OSError:  # another system
        return None
    return None if found is None else int(found[1])
