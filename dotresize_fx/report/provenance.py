"""Where a result came from: package versions and the machine, for the report."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dotresize_fx.report.contents import Machine

#: What the report names, and the distributions that can bring it, the first installed one counts.
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "numpy": ("numpy",),
}


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape the result; "not installed" where one is missing."""
    versions = {"python": platform.python_version()}
    for name, distributions in _DISTRIBUTIONS.items():
        versions[name] = "not installed"
        for distribution in distributions:
            try:
                versions[name] = version(distribution)
            except PackageNotFoundError:
                continue
            break
    return versions


def this_machine(threads: int) -> Machine:
    """The machine this process runs on; ``threads`` is what the caller computes with."""
    return Machine(cpu=_cpu_model(), threads=threads, platform=platform.platform())


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
