"""The child that runs ONNX Runtime: ``python -P -m dotresize_fx.export.runtime_process``.

Requests come as lines of JSON on standard input and are answered so on standard output; arrays lie in .npz files in
the working folder. A process of its own keeps the runtime's memory out of the export process and measures it. Kept
light: importing torch here would be measured too.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dotresize_fx.errors import DotresizeError, OnnxRuntimeError
from dotresize_fx.export.format_runtimes import RUNTIMES, Model
from dotresize_fx.export.gpu_busy import gpu_busy
from dotresize_fx.export.graph_inputs import InputPlan, make_inputs
from dotresize_fx.export.node_profile import profile_nodes
from dotresize_fx.export.onnx_session import CUDA, OnnxModel
from dotresize_fx.export.peak_memory import CudaMemory, peak_rss_bytes
from dotresize_fx.export.timed_model import TimedModel

_CHUNK = 1 << 20  # elements compared at a time: differences in float64 must not double the measured memory


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
        array = array.swapaxes(1, 2)
    real: np.ndarray[Any, Any] = array if array.shape[: mask.ndim] != mask.shape else array[mask]
    return real


def _compare(request: dict[str, Any]) -> dict[str, Any]:
    if request["runtime"] in RUNTIMES:
        model: Model = RUNTIMES[request["runtime"]](Path(request["model"]), request["threads"])
    else:
        # What is compared must not differ by how CUDA rounds products of float32.
        model = OnnxModel(request["model"], threads=request["threads"], provider=request["provider"], tf32=False)
    cases = []
    for case in request["cases"]:
        path = Path(case["file"])
        inputs = _load(path, case["inputs"])
        actual = model(inputs)
        if len(actual) != case["outputs"]:
            raise OnnxRuntimeError(f"{request['model']} has {len(actual)} outputs, {case['outputs']} were expected")
        with np.load(path, allow_pickle=False) as archive:
            expected = [archive[f"expected_{index}"] for index in range(case["outputs"])]
        mask = None if request["mask"] is None else inputs[request["mask"]].astype(bool)
        pairs = [largest_difference(_real(a, mask), _real(b, mask)) for a, b in zip(actual, expected, strict=True)]
        cases.append(
            {
                "differences": [difference for difference, _ in pairs],
                "scales": [scale for _, scale in pairs],
                "shapes": [list(array.shape) for array in actual],
                "expected_shapes": [list(array.shape) for array in expected],
            }
        )
        path.unlink()  # the folder may be on a small disk, and each case is read once
    return {"cases": cases}


class Timed:
    """The model that is being timed, what it is fed, and how much of the device's memory it has taken."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._cuda = CudaMemory() if request["provider"] == CUDA else None
        self._taken = self._most = 0
        self._model: TimedModel
        self._plans = [InputPlan.from_json(entry) for entry in request.get("plans", ())]
        self._sizes = (request.get("batch", 1), request.get("length", 1))

        def open_and_start() -> None:
            self._model = TimedModel(request["model"], threads=request["threads"], provider=request["provider"])
            made = make_inputs(self._plans, *self._sizes, 0)
            self._model.start_with(_load(Path(request["file"]), request["inputs"]) if "file" in request else made)

        self._counted(open_and_start)

    def run(self, tokens: int) -> dict[str, Any]:
        """Time a run of the prompt, and behind it one run for each of so many tokens."""
        answer: dict[str, Any] = {}
        batch, length = self._sizes
        plain = [plan for plan in self._plans if not plan.cache]
        cache = {plan.name: plan.present for plan in self._plans if plan.present is not None}

        def timed() -> None:
            answer["prompt"] = self._model.run()
            answer["tokens"] = self._model.continue_with(
                tokens, lambda step: make_inputs(plain, batch, 1, length + step), cache
            )

        self._counted(timed)
        return {**answer, "device_bytes": self._most if self._cuda and self._cuda.name else None}

    @property
    def device(self) -> str | None:
        return self._cuda.name if self._cuda else None

    def _counted(self, work: Any) -> None:
        """While this process works the other children wait: what the device then lacks more, this one has taken."""
        before = self._cuda.used() if self._cuda else None
        work()
        after = self._cuda.used() if self._cuda else None
        if before is not None and after is not None:
            self._taken += after - before
            self._most = max(self._most, self._taken)


def _profile(request: dict[str, Any]) -> dict[str, Any]:
    plans = [InputPlan.from_json(entry) for entry in request["plans"]]
    profile = profile_nodes(
        request["model"],
        make_inputs(plans, request["batch"], request["length"], request["past"]),
        threads=request["threads"],
        provider=request["provider"],
        runs=request["runs"],
        optimised=request["optimised"],
        equations=request["equations"],
        work=Path.cwd(),
        fastest=request.get("fastest", False),
    )
    return asdict(profile)


def _busy(request: dict[str, Any]) -> dict[str, Any]:
    model = TimedModel(request["model"], threads=request["threads"], provider=request["provider"])
    plans = [InputPlan.from_json(entry) for entry in request["plans"]]
    model.start_with(make_inputs(plans, request["batch"], request["length"], request["past"]))
    return {"busy": gpu_busy(model.run)}


def _device(_: dict[str, Any]) -> dict[str, Any]:
    return {"device": CudaMemory().name}


TASKS = {"compare": _compare, "profile": _profile, "busy": _busy, "device": _device}


def _requests() -> queue.SimpleQueue[str]:
    """The lines of standard input. When it closes this process ends: the parent holds it open until it ends itself."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def main() -> None:
    """Answer requests until standard input closes. User errors travel in the answer; anything else ends as a traceback
    on standard error.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    requests = _requests()
    timed: Timed | None = None
    while True:
        request = json.loads(requests.get())
        try:
            if request["task"] == "open":
                timed = Timed(request)
                answer: dict[str, Any] = {"device": timed.device}
            elif request["task"] == "run":
                assert timed is not None
                answer = timed.run(request["tokens"])
            else:
                answer = {"compare": _compare, "profile": _profile, "busy": _busy, "device": _device}[request["task"]](
                    request
                )
        except DotresizeError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        answers.write(json.dumps({**answer, "peak_rss_bytes": peak_rss_bytes()}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
