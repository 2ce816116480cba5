"""The child that runs ONNX Runtime: ``python -P -m dotresize_fx.export.runtime_process REQUEST RESPONSE``.

REQUEST is a JSON file, arrays lie beside it in .npz files, RESPONSE is written last. A process of its own
keeps the runtime's memory out of the export process and measures it. Kept light: importing torch here would
be measured too.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from dotresize_fx.errors import DotresizeError, OnnxRuntimeError
from dotresize_fx.export.onnx_session import OnnxModel

_CHUNK = 1 << 20  # elements compared at a time: differences in float64 must not double the measured memory
_FEWEST_RUNS = 5


def largest_difference(actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> tuple[float, float]:
    """(max |actual - expected|, max finite |expected|), computed in float64; (0, 0) for empty arrays.

    A NaN on either side or another shape makes the difference infinite. Equal infinities (a masked logit)
    differ by nothing.
    """
    difference, scale = 0.0 if actual.shape == expected.shape else float("inf"), 0.0
    left, right = actual.reshape(-1), expected.reshape(-1)
    for start in range(0, right.size, _CHUNK):
        b = right[start : start + _CHUNK].astype(np.float64)
        scale = max(scale, float(np.abs(b, where=np.isfinite(b), out=np.zeros_like(b)).max()))
        if actual.shape == expected.shape:
            a = left[start : start + _CHUNK].astype(np.float64)
            with np.errstate(invalid="ignore"):
                gap = np.where(a == b, 0.0, np.abs(a - b))
            difference = max(difference, float("inf") if np.isnan(gap).any() else float(gap.max()))
    return difference, scale


def _load(path: Path, names: list[str]) -> dict[str, np.ndarray[Any, Any]]:
    # Stored under numbers: an archive member may not be called what a graph's input may.
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[f"input_{index}"] for index, name in enumerate(names)}


def _real(array: np.ndarray[Any, Any], mask: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
    """The entries of an output that belong to unmasked positions; all, for an output without positions.

    Keys and values of a cache, (batch, heads, length, size), have them on their third axis.
    """
    if mask is None:
        return array
    if array.ndim == 4 and (array.shape[0], array.shape[2]) == mask.shape:
        return array.swapaxes(1, 2)[mask]
    return array if array.shape[: mask.ndim] != mask.shape else array[mask]


def _compare(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    model = OnnxModel(request["model"], threads=request["threads"], provider=request["provider"])
    cases = []
    for case in request["cases"]:
        path = folder / case["file"]
        inputs = _load(path, case["inputs"])
        actual = model(inputs)
        if len(actual) != case["outputs"]:
            raise OnnxRuntimeError(f"{model.path} has {len(actual)} outputs, {case['outputs']} were expected")
        with np.load(path, allow_pickle=False) as archive:
            expected = [archive[f"expected_{index}"] for index in range(case["outputs"])]
        mask = None if request["mask"] is None else inputs[request["mask"]].astype(bool)
        pairs = [largest_difference(_real(a, mask), _real(b, mask)) for a, b in zip(actual, expected, strict=True)]
        cases.append(
            {
                "max_abs_difference": max(difference for difference, _ in pairs),
                "max_abs_expected": max(scale for _, scale in pairs),
                "shapes": [list(array.shape) for array in actual],
                "expected_shapes": [list(array.shape) for array in expected],
            }
        )
        path.unlink()  # the folder may be on a small disk, and each case is read once
    return {"cases": cases}


def _measure(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    inputs = _load(folder / request["file"], request["inputs"])
    models = {
        name: OnnxModel(path, threads=request["threads"], provider=request["provider"])
        for name, path in request["models"].items()
    }
    given = {name: model.at_start(inputs) for name, model in models.items()}
    started = time.monotonic()

    def spent(part: float) -> bool:
        elapsed = time.monotonic() - started
        return elapsed > part * float(request["budget"])

    for index in range(request["warmup"]):
        if index and spent(0.2):
            break
        for name, model in models.items():
            model(given[name])
    seconds: dict[str, list[float]] = {name: [] for name in models}
    # In turns, so that what else the machine does meets every model alike.
    for index in range(request["runs"]):
        if index >= _FEWEST_RUNS and spent(1.0):
            break
        for name, model in models.items():
            begin = time.perf_counter()
            model(given[name])
            seconds[name].append(time.perf_counter() - begin)
    return {"seconds": seconds}


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


def _end_with_parent() -> None:
    """End this process when standard input closes: the parent holds it open until it ends itself."""

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str]) -> int:
    """Answer one request. User errors travel in the response; anything else ends as a traceback on stderr."""
    request_path, response_path = Path(arguments[0]), Path(arguments[1])
    _end_with_parent()
    request = json.loads(request_path.read_text(encoding="utf-8"))
    try:
        answer = {"compare": _compare, "measure": _measure}[request["task"]](request, request_path.parent)
    except DotresizeError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    answer["peak_rss_bytes"] = peak_rss_bytes()
    response_path.write_text(json.dumps(answer), encoding="utf-8")
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: at shutdown the watching thread may hold standard input's lock.
    os._exit(status)
