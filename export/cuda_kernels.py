"""What one product takes on CUDA, where ONNX Runtime's profiler sees no more than that it is launched."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from dotresize_fx.errors import MissingExtraError
from dotresize_fx.export.graph_inputs import InputPlan
from dotresize_fx.export.onnx_session import CUDA
from dotresize_fx.export.region_kernels import Kernel
from dotresize_fx.export.runtime_child import RuntimeChild

# Copies of a product in one run, each with factors of its own, which no cache holds: so that what a run costs beside is
# shared. As many as fit.
FEWEST, MOST, BYTES = 2, 8, 1 << 28
WARM_UP, RUNS = 3, 10
_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.float16}
_WEIGHTS = "kernel.bin"


def cuda_device() -> str:
    """The name of CUDA's first device. Raises MissingExtraError where there is none."""
    with RuntimeChild() as child:
        name = child.ask("device")["device"]
    if not name:
        raise MissingExtraError("CUDA's driver finds no GPU here: time on the CPU with --target cpu")
    return str(name)


def timed_on_cuda(
    kernels: Iterable[Kernel], threads: int, dtype: str, work: Path | None, step: Callable[[], None]
) -> dict[str, float]:
    """Seconds of each product by its name, of the fastest run; ``step`` is called once a product."""
    found = {}
    with tempfile.TemporaryDirectory(dir=work, prefix="kernels-") as name, RuntimeChild(work) as child:
        folder = Path(name)
        for kernel in kernels:
            path, plans, copies = write_copies(kernel, dtype, folder)
            inputs = [plan.as_json() for plan in plans]
            child.ask("open", model=str(path), threads=threads, provider=CUDA, plans=inputs, batch=1, length=1)
            taken = [child.ask("run", tokens=0)["prompt"] for _ in range(WARM_UP + RUNS)]
            found[str(kernel)] = min(taken[WARM_UP:]) / copies
            step()
    return found


def write_copies(kernel: Kernel, dtype: str, folder: Path) -> tuple[Path, list[InputPlan], int]:
    """A model that multiplies so many times, and what it is fed. The file of weights grows with what is asked."""
    import onnx
    from onnx import helper

    number = np.dtype(_TYPES[dtype])
    element = helper.np_dtype_to_tensor_dtype(number)
    groups = max(kernel.groups, 1)
    one = number.itemsize * groups * (kernel.inner * kernel.columns + kernel.rows * (kernel.inner + kernel.columns))
    copies = min(max(BYTES // one, FEWEST), MOST)
    front = (kernel.groups,) if kernel.groups else ()
    left, right = (*front, kernel.rows, kernel.inner), (*front, kernel.inner, kernel.columns)
    result = (*front, kernel.rows, kernel.columns)
    fed, nodes, weights, outputs = [], [], [], []
    for index in range(copies):
        nodes.append(helper.make_node("MatMul", [f"left_{index}", f"right_{index}"], [f"result_{index}"]))
        outputs.append(helper.make_tensor_value_info(f"result_{index}", element, result))
        fed.append((f"left_{index}", left))
        if kernel.groups:
            fed.append((f"right_{index}", right))
            continue
        weight = onnx.TensorProto(name=f"right_{index}", data_type=element, dims=right)
        weight.data_location = onnx.TensorProto.EXTERNAL
        length = number.itemsize * kernel.inner * kernel.columns
        for key, value in {"location": _WEIGHTS, "offset": 0, "length": length}.items():
            weight.external_data.add(key=key, value=str(value))
        weights.append(weight)
    if weights:
        file, length = folder / _WEIGHTS, number.itemsize * kernel.inner * kernel.columns
        if not file.exists() or file.stat().st_size < length:
            numbers = np.random.default_rng(0).standard_normal(kernel.inner * kernel.columns, np.float32)
            file.write_bytes(numbers.astype(number).tobytes())
    given = [helper.make_tensor_value_info(name, element, dims) for name, dims in fed]
    graph = helper.make_graph(nodes, "kernel", given, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "kernel.onnx")
    return folder / "kernel.onnx", [InputPlan(name, number.name, dims, "normal") for name, dims in fed], copies
