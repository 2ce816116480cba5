"""How much of the time CUDA device 0 is busy, as its driver counts it (NVML), for profilers that see no kernels."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from statistics import median

# NVML tells of the last sixth of a second to second, which of the two depends on the card.
SETTLING, LASTING, BETWEEN = 1.2, 1.0, 0.2


class _Utilisation(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


def gpu_busy(work: Callable[[], object]) -> float | None:
    """The share of the time, 0 to 1, that kernels run while ``work`` is done over and over for two seconds.

    None where NVML cannot be asked. Other programs' kernels count too.
    """
    read = _reader()
    if read is None:
        return None
    started = last = time.perf_counter()
    found = []
    while (now := time.perf_counter()) - started < SETTLING + LASTING:
        work()
        if now - started > SETTLING and now - last > BETWEEN:
            last = now
            if (share := read()) is not None:
                found.append(share)
    return median(found) if found else None


def _reader() -> Callable[[], float | None] | None:
    """Of CUDA's first device, which CUDA_VISIBLE_DEVICES may make another than NVML's first."""
    windows = sys.platform == "win32"
    try:
        driver = ctypes.CDLL("nvcuda.dll" if windows else "libcuda.so.1")
        nvml = ctypes.CDLL("nvml.dll" if windows else "libnvidia-ml.so.1")
    except OSError:
        return None
    address, handle = ctypes.create_string_buffer(32), ctypes.c_void_p()
    if (
        driver.cuInit(0)
        or driver.cuDeviceGetPCIBusId(address, len(address), 0)
        or nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByPciBusId_v2(address, ctypes.byref(handle))
    ):
        return None

    def read() -> float | None:
        used = _Utilisation()
        return None if nvml.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(used)) else used.gpu / 100

    return read
