"""When this process began: imports take seconds before any clock of the program's own runs."""

from __future__ import annotations

import os
import time
from pathlib import Path

# Of /proc/self/stat behind the name in brackets, which may hold anything: the 22nd field of all, in ticks since boot.
_STARTED = 22 - 3


def process_start() -> float:
    """By ``time.perf_counter``; where the system does not say, now."""
    now = time.perf_counter()
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        started = int(fields[_STARTED]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, IndexError, ValueError):  # not Linux
        return now
    return now - max(age, 0.0)
