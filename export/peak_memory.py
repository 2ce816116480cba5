"""How much memory this process has taken: resident, and on a CUDA device."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


def peak_rss_bytes() -> int | None:
    """Peak resident memory of this process; None where the system does not tell.

    On Linux ``ru_maxrss`` would not do: it survives exec, so a child starts with its parent's peak.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    # macOS counts bytes, the others kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class CudaMemory:
    """Memory in use on CUDA device 0, by whichever process, through the driver that ONNX Runtime uses too.

    ``name`` is the device's; it and :meth:`used` are None where the driver cannot be asked.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._driver: ctypes.CDLL | None = None
        try:
            driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        except OSError:
            return
        # The primary context, which CUDA's runtime also takes: a context of its own would take memory again.
        context = ctypes.c_void_p()
        name = ctypes.create_string_buffer(128)
        if (
            driver.cuInit(0) == 0
            and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
            and driver.cuCtxSetCurrent(context) == 0
        ):
            self._driver = driver
            if driver.cuDeviceGetName(name, len(name), 0) == 0:
                self.name = name.value.decode(errors="replace")

    def used(self) -> int | None:
        """Bytes in use now."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        if self._driver is None or self._driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) != 0:
            return None
        return total.value - free.value
