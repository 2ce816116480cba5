"""What products of given sizes take in ONNX Runtime on this machine, kept in the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dotresize_fx.errors import OutputError
from dotresize_fx.export.builtin_models import cache_folder
from dotresize_fx.export.cuda_kernels import cuda_device, timed_on_cuda
from dotresize_fx.export.graph_inputs import InputPlan
from dotresize_fx.export.onnx_session import CPU
from dotresize_fx.export.region_kernels import Kernel
from dotresize_fx.export.runtime_child import RuntimeChild
from dotresize_fx.progress import Progress
from dotresize_fx.report.provenance import package_versions, this_machine

SCHEMA_VERSION = 1
# Of one file: ONNX Runtime keeps a packed copy of every weight.
LARGEST_FILE = 1 << 29
# Runs, behind one that warms up: as many as go into the seconds, which all files share.
FEWEST_RUNS, MOST_RUNS, SECONDS = 5, 30, 20.0
_WEIGHTS = "kernels.bin"


def conditions(threads: int, provider: str = CPU, dtype: str = "float32") -> dict[str, Any]:
    """What a time depends on beside the sizes."""
    return {
        "device": this_machine(threads).cpu if provider == CPU else cuda_device(),
        "provider": provider,
        "dtype": dtype,
        "onnxruntime": package_versions()["onnxruntime"],
        "threads": threads,
    }


def cache_file(where: Mapping[str, Any]) -> Path | None:
    """The file that holds the times of these conditions; None where there is no home folder."""
    name = hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()[:16]
    try:
        return cache_folder() / "kernels" / f"{name}.json"
    except OutputError:
        return None


def read_times(file: Path | None, where: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by kernel; none where there is no file, or it is damaged, or of other conditions."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file else None
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        return {}
    times = content.get("seconds")
    if content.get("conditions") != where or not isinstance(times, dict):
        return {}
    fine = all(isinstance(found, float) and 0 < found < float("inf") for found in times.values())
    return times if fine else {}


def write_times(file: Path | None, where: Mapping[str, Any], times: Mapping[str, float]) -> None:
    """Written beside, then renamed. Where that cannot be, the next run measures anew."""
    if file is None:
        return
    content = {"schema_version": SCHEMA_VERSION, "conditions": where, "seconds": dict(sorted(times.items()))}
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def kernel_times(
    kernels: Iterable[Kernel],
    threads: int,
    progress: Progress,
    work: Path | None = None,
    *,
    anchors: Iterable[Kernel] = (),
    provider: str = CPU,
    dtype: str = "float32",
) -> dict[Kernel, float]:
    """Seconds of each, on so many threads; those that no earlier run has timed are timed now, in ``work``. On CUDA they
    are those of ``dtype``, where bfloat16 is taken to be as fast as float16.

    All kernels of a file run one after the other in every run: so each finds the caches as the others left them, as in
    a model, and what else the machine does meets all alike. A kernel's time is that of its fastest run. ``anchors``,
    some of the kernels, are timed each time: a machine that others use too is not always as fast, and what is known of
    the other kernels is taken to have changed as these have.

    Raises:
        OnnxRuntimeError: ONNX Runtime failed.
    """
    wanted = sorted(set(kernels))
    where = conditions(threads, provider, dtype)
    file = cache_file(where)
    known = read_times(file, where)
    missing = {kernel for kernel in wanted if str(kernel) not in known}
    now: dict[str, float] = {}
    if timed := sorted(missing.union(anchors)):
        parts = list(_parts(timed)) if provider == CPU else []
        with progress.stage(f"time {len(timed)} kernels", len(parts or timed)) as step:
            if provider != CPU:
                now = timed_on_cuda(timed, threads, dtype, work, step)
            for part in parts:
                now |= _timed(part, threads, SECONDS / len(parts), work)
                step()
    changes = [now[name] / known[name] for name in map(str, anchors) if name in known]
    slower = median(changes) if changes else 1.0
    if missing:
        # As they were when the others were timed. Another process may have written meanwhile.
        added = {str(kernel): now[str(kernel)] / slower for kernel in missing}
        write_times(file, where, read_times(file, where) | added)
    return {kernel: now[str(kernel)] if kernel in missing else known[str(kernel)] * slower for kernel in wanted}


def _parts(kernels: Sequence[Kernel]) -> Iterator[list[Kernel]]:
    part: list[Kernel] = []
    size = 0
    for kernel in kernels:
        size += (own := 4 * kernel.inner * kernel.columns * max(kernel.groups, 1))
        if part and size > LARGEST_FILE:
            yield part
            part, size = [], own
        part.append(kernel)
    if part:
        yield part


def _timed(kernels: Sequence[Kernel], threads: int, seconds: float, work: Path | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=work, prefix="kernels-") as folder:
        path, plans = write_kernels(kernels, Path(folder))
        request: dict[str, Any] = {
            "model": str(path.resolve()),
            "threads": threads,
            "provider": CPU,
            "plans": [plan.as_json() for plan in plans],
            # A kernel of two threads waits for the slower one: where others use the cores, only the fastest run tells.
            **{"batch": 1, "length": 1, "past": 0, "optimised": True, "equations": {}, "fastest": True},
        }
        with RuntimeChild(work) as child:
            first = child.ask("profile", runs=1, **request)["nodes"]
            runs = int(seconds / max(sum(node["seconds"] for node in first), 1e-6))
            nodes = child.ask("profile", runs=min(max(runs, FEWEST_RUNS), MOST_RUNS), **request)["nodes"]
    found = {node["name"]: node["seconds"] for node in nodes}
    # The profiler counts whole microseconds.
    return {str(kernel): max(found[str(kernel)], 5e-7) for kernel in kernels}


def write_kernels(kernels: Sequence[Kernel], folder: Path) -> tuple[Path, list[InputPlan]]:
    """A model with a node for each kernel, called as that, whose result is one number; and what it is fed.

    All weights begin at the same place of one file of random numbers.
    """
    import onnx
    from onnx import TensorProto, helper

    inputs: dict[str, tuple[int, ...]] = {}
    nodes, weights, outputs = [], [], []

    def fed(*dims: int) -> str:
        name = "x_" + "x".join(map(str, dims))
        inputs[name] = dims
        return name

    largest = max((k.inner * k.columns for k in kernels if not k.groups), default=0)
    numbers = np.random.default_rng(0).standard_normal(largest, np.float32)
    (folder / _WEIGHTS).write_bytes(numbers.tobytes())
    for kernel in kernels:
        name = str(kernel)
        if kernel.groups:
            sides = [fed(kernel.groups, kernel.rows, kernel.inner), fed(kernel.groups, kernel.inner, kernel.columns)]
        else:
            weight = TensorProto(
                name=f"weight_{name}", data_type=TensorProto.FLOAT, dims=(kernel.inner, kernel.columns)
            )
            weight.data_location = TensorProto.EXTERNAL
            places = {"location": _WEIGHTS, "offset": 0, "length": 4 * kernel.inner * kernel.columns}
            for key, value in places.items():
                weight.external_data.add(key=key, value=str(value))
            weights.append(weight)
            sides = [fed(kernel.rows, kernel.inner), weight.name]
        nodes.append(helper.make_node("MatMul", sides, [f"y_{name}"], name))
        nodes.append(helper.make_node("ReduceMax", [f"y_{name}"], [f"most_{name}"], f"reduce_{name}", keepdims=0))
        outputs.append(helper.make_tensor_value_info(f"most_{name}", TensorProto.FLOAT, []))
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in inputs.items()]
    graph = helper.make_graph(nodes, "kernels", given, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "kernels.onnx")
    return folder / "kernels.onnx", [InputPlan(name, "float32", dims, "normal") for name, dims in inputs.items()]
