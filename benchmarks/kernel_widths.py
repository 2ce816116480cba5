"""Which widths do the device's matrix kernels like? Two pairs of products through a width, in ONNX Runtime on CUDA.

    python benchmarks/kernel_widths.py                       # 4096 <-> 9984 ... 10240 by 16, and one off the grid
    python benchmarks/kernel_widths.py --widths 1072 1075 1088 --hidden 576

All widths take turns; a row is the median of the rounds and half their interquartile range. "slower than next" says
where a width is slower than the next larger one by more than both spreads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
from bench import line
from onnx import TensorProto, helper

ELEMENT = TensorProto.FLOAT16


def session(rows: int, hidden: int, width: int) -> onnxruntime.InferenceSession:
    """x (rows, hidden), up (hidden, width), down (width, hidden) -> ((x up) down up) down."""
    shapes = {"x": (rows, hidden), "up": (hidden, width), "down": (width, hidden), "y": (rows, hidden)}
    steps = [("x", "up", "a"), ("a", "down", "b"), ("b", "up", "c"), ("c", "down", "y")]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [left, right], [out]) for left, right, out in steps],
        "widths",
        [helper.make_tensor_value_info(name, ELEMENT, shapes[name]) for name in ("x", "up", "down")],
        [helper.make_tensor_value_info("y", ELEMENT, shapes["y"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CUDAExecutionProvider"])


def bound(run: onnxruntime.InferenceSession, rows: int, hidden: int, width: int) -> onnxruntime.IOBinding:
    generator = np.random.default_rng(0)
    binding = run.io_binding()
    for name, shape in (("x", (rows, hidden)), ("up", (hidden, width)), ("down", (width, hidden))):
        array = (generator.standard_normal(shape, np.float32) / hidden**0.5).astype(np.float16)
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
    binding.bind_output("y", "cuda")
    return binding


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--widths", type=int, nargs="+", default=[*range(9984, 10241, 16), 10035])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeat", type=int, default=10, help="runs in a row that are timed together")
    return parser.parse_args(given)


def main() -> None:
    arguments = parse()
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    widths = sorted(arguments.widths)
    ready = []
    for width in widths:
        run = session(arguments.rows, arguments.hidden, width)
        ready.append((run, bound(run, arguments.rows, arguments.hidden, width)))
    seconds: list[list[float]] = [[] for _ in widths]
    for round_ in range(arguments.rounds + 3):
        for (run, binding), found in zip(ready, seconds, strict=True):
            run.run_with_iobinding(binding)
            binding.synchronize_outputs()
            started = time.perf_counter()
            for _ in range(arguments.repeat):
                run.run_with_iobinding(binding)
            binding.synchronize_outputs()
            if round_ >= 3:
                found.append((time.perf_counter() - started) / arguments.repeat)
    medians = [float(np.median(found)) for found in seconds]
    spreads = [float(np.subtract(*np.percentile(found, [75, 25])) / 2) for found in seconds]
    print(f"{arguments.rows} rows, float16, {arguments.hidden} wide, {onnxruntime.__version__}\n")
    line(["width", "multiple of 16", "ms", "spread", "slower than next"])
    line(["---"] * 5)
    on_grid = [i for i, width in enumerate(widths) if width % 16 == 0]
    for i, width in enumerate(widths):
        larger = next((j for j in on_grid if j > i), None)
        slower = "" if larger is None else medians[i] - medians[larger] > spreads[i] + spreads[larger]
        line([str(width), str(width % 16 == 0), f"{1e3 * medians[i]:.3f}", f"{1e3 * spreads[i]:.3f}", str(slower)])


if __name__ == "__main__":
    main()
