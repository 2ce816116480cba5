"""ONNX Runtime in a process of its own: does the file compute what the program computes, and how fast.

The child is ``runtime_process``; it ends with this process, whether that is interrupted, fails or is killed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import dotresize_fx.errors
from dotresize_fx.errors import DotresizeError, OnnxRuntimeError, OutputError
from dotresize_fx.export.onnx_session import (
    CPU,
    OnnxModel,
    physical_cores,
    require_onnx_runtime,
)
from dotresize_fx.report.contents import Latency

__all__ = [
    "CaseComparison",
    "Comparison",
    "OnnxModel",
    "compare_outputs",
    "measure_latency",
]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class CaseComparison:
    """One case: the largest |actual - expected| over all outputs, and the largest finite |expected|.

    The difference is infinite where either side holds a NaN or the shapes differ.
    """

    max_abs_difference: float
    max_abs_expected: float
    shapes: tuple[tuple[int, ...], ...]
    expected_shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All cases (at least one), and the child's peak memory (bytes; None where the system does not tell)."""

    cases: tuple[CaseComparison, ...]
    threads: int
    provider: str
    peak_rss_bytes: int | None

    @property
    def max_abs_difference(self) -> float:
        return max(case.max_abs_difference for case in self.cases)

    @property
    def max_abs_expected(self) -> float:
        return max(case.max_abs_expected for case in self.cases)


def compare_outputs(
    model_path: Path,
    cases: Iterable[tuple[Mapping[str, Array], Sequence[Array]]],
    work: Path,
    *,
    mask: str | None = None,
    threads: int | None = None,
    provider: str = CPU,
) -> Comparison:
    """Run every case's inputs through the ONNX file and compare with its expected outputs, in graph order.

    ``mask`` names an input (batch, length): outputs that begin with these dimensions are compared where it is not
    0, since what a model puts out for padding means nothing and is not well-conditioned.
    ``cases`` may be a generator: each case is written to ``work`` before the next one is asked for. Raises
    ValueError without a case, MissingExtraError, ModelNotFoundError, BadWeightsError, OnnxRuntimeError and
    OutputError (no room for the arrays).
    """
    require_onnx_runtime()
    count = threads or physical_cores()
    with tempfile.TemporaryDirectory(dir=work, prefix="compare-") as name:
        folder = Path(name).resolve()
        listed = []
        for index, (inputs, expected) in enumerate(cases):
            listed.append({"file": f"{index}.npz", "inputs": list(inputs), "outputs": len(expected)})
            _store(folder / f"{index}.npz", list(inputs.values()), expected)
        if not listed or not all(case["outputs"] for case in listed):
            raise ValueError("nothing to compare: no case, or a case without outputs")
        request = {"task": "compare", "model": str(Path(model_path).resolve()), "cases": listed, "mask": mask}
        answer = _ask({**request, "threads": count, "provider": provider}, folder)
    results = tuple(
        CaseComparison(
            case["max_abs_difference"],
            case["max_abs_expected"],
            tuple(tuple(shape) for shape in case["shapes"]),
            tuple(tuple(shape) for shape in case["expected_shapes"]),
        )
        for case in answer["cases"]
    )
    return Comparison(results, count, provider, answer["peak_rss_bytes"])


def measure_latency(
    models: Mapping[str, Path],
    inputs: Mapping[str, Array],
    *,
    runs: int = 30,
    warmup: int = 3,
    threads: int | None = None,
    provider: str = CPU,
    budget: float = 60.0,
    work: Path | None = None,
) -> dict[str, Latency]:
    """Time ``models`` on the same ``inputs`` in turns (A B A B) in one process with all sessions open.

    Caches are empty.
    ``threads`` defaults to one a physical core. Once ``budget`` seconds are spent no further round starts,
    except that every model runs 5 times at least (``runs`` times where that is fewer). ``work`` is for the
    inputs' file (default: the system's temporary folder). Raises as :func:`compare_outputs` does.
    """
    require_onnx_runtime()
    if not models or runs < 1:
        raise ValueError("nothing to measure: no model, or no run")
    count = threads or physical_cores()
    with tempfile.TemporaryDirectory(dir=work, prefix="measure-") as name:
        folder = Path(name).resolve()
        _store(folder / "inputs.npz", list(inputs.values()), ())
        request = {
            "task": "measure",
            "models": {key: str(Path(path).resolve()) for key, path in models.items()},
            "file": "inputs.npz",
            "inputs": list(inputs),
            "runs": runs,
            "warmup": warmup,
            "budget": budget,
            "threads": count,
            "provider": provider,
        }
        answer = _ask(request, folder)
    shape: tuple[int, ...] = next((array.shape for array in inputs.values()), ())
    latencies = {}
    for key, seconds in answer["seconds"].items():
        low, middle, high = (float(value) for value in np.percentile(seconds, (25, 50, 75)))
        latencies[key] = Latency(
            median=middle,
            min=min(seconds),
            max=max(seconds),
            p25=low,
            p75=high,
            runs=len(seconds),
            batch=shape[0] if shape else None,
            length=shape[1] if len(shape) > 1 else None,
            threads=count,
            provider=provider,
            peak_rss_bytes=answer["peak_rss_bytes"],
        )
    return latencies


def _store(path: Path, inputs: Sequence[Array], expected: Sequence[Array]) -> None:
    arrays = {f"input_{index}": array for index, array in enumerate(inputs)}
    arrays |= {f"expected_{index}": array for index, array in enumerate(expected)}
    try:
        np.savez(path, allow_pickle=False, **arrays)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; free space there") from error


def _ask(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the child on ``request`` in ``folder`` and return its answer; its user errors are raised again."""
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    # -P: neither the working folder nor a source tree in it may shadow the installed package.
    command = [sys.executable, "-P", "-m", "dotresize_fx.export.runtime_process"]
    command += [str(folder / "request.json"), str(folder / "response.json")]
    with (folder / "stderr.txt").open("wb") as errors:
        child = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            status = child.wait()
        finally:  # KeyboardInterrupt above all
            if child.poll() is None:
                child.kill()
                child.wait()
            if child.stdin is not None:
                child.stdin.close()
    response = folder / "response.json"
    if status != 0 or not response.is_file():
        raise OnnxRuntimeError(_last_words(status, folder / "stderr.txt"))
    answer: dict[str, Any] = json.loads(response.read_text(encoding="utf-8"))
    if "error" in answer:
        kind = getattr(dotresize_fx.errors, answer["error"], OnnxRuntimeError)
        error = kind(answer["message"]) if issubclass(kind, DotresizeError) else OnnxRuntimeError(answer["message"])
        raise error
    return answer


def _last_words(status: int, stderr: Path) -> str:
    lines = [line.strip() for line in stderr.read_text(encoding="utf-8", errors="replace").splitlines()]
    said = next((line for line in reversed(lines) if line), "it said nothing")
    if status >= 0:
        return f"the ONNX Runtime process ended with status {status}: {said}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"the ONNX Runtime process was ended by {name}{hint}: {said}"
