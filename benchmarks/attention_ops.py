"""Which of ONNX's ways to say attention does ONNX Runtime run fastest? Behind a cache, with a mask for each sequence.

    python benchmarks/attention_ops.py                                       # SmolLM2-135M's heads, float32, on the CPU
    python benchmarks/attention_ops.py --device cuda --dtype float16 --heads 32 8 128 --case 1 512 0 --case 16 1 544

``primitives`` are products and a softmax, with KV heads repeated; ``MultiHeadAttention`` and ``GroupQueryAttention``
are ONNX Runtime's own, ``Attention`` the standard's (opset 23). A case is (batch, new tokens, cached tokens). All take
turns; a row is the median of the rounds, and the largest difference from the primitives.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from bench import line
from onnx import helper

Arrays = dict[str, np.ndarray[Any, Any]]
MICROSOFT = "com.microsoft"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
WAYS = ("primitives", "MultiHeadAttention", "GroupQueryAttention", "Attention")
COLUMNS = ("batch", "new", "cached", "way", "ms", "to primitives", "difference")


@dataclass(frozen=True)
class Heads:
    """Of queries and of keys and values; ``size`` of queries and keys, ``value`` of values."""

    queries: int
    pairs: int
    size: int
    value: int

    def of(self, side: str) -> int:
        """The size on the side named so."""
        return self.value if "value" in side else self.size


def model(way: str, heads: Heads, dtype: np.dtype[Any]) -> onnx.ModelProto:
    """query, key, value (batch, new, heads * size), a past, and a bias (batch, 1, new, all) -> out, and the present."""
    element = helper.np_dtype_to_tensor_dtype(dtype)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def number(value: Any, kind: Any = np.int64) -> str:
        name = f"number_{len(weights)}"
        weights.append(onnx.numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def add(op: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, outputs, **attributes))
        return outputs[0]

    def repeated(side: str) -> str:
        split = add("Reshape", [side, number([0, 0, heads.pairs, heads.of(side)])], f"{side}_split")
        first = add("Transpose", [split], f"{side}_first", perm=[0, 2, 1, 3])
        present = add("Concat", [f"past_{side}", first], f"present_{side}", axis=2)
        opened = add("Unsqueeze", [present, number([2])], f"{side}_opened")
        shape = add("Shape", [present], f"{side}_shape")
        ends = [add("Gather", [shape, number(places)], f"{side}_{places[0]}") for places in ([0, 1], [2, 3])]
        wide = add("Concat", [ends[0], number([heads.queries // heads.pairs]), ends[1]], f"{side}_wide", axis=0)
        expanded = add("Expand", [opened, wide], f"{side}_expanded")
        return add("Reshape", [expanded, number([0, heads.queries, -1, heads.of(side)])], f"{side}_all")

    own = {"num_heads": heads.queries, "kv_num_heads": heads.pairs}
    if way == "Attention":
        inputs = ["query", "key", "value", "bias", "past_key", "past_value"]
        counts = {f"q_{key}" if key == "num_heads" else key: value for key, value in own.items()}
        add("Attention", inputs, "out", "present_key", "present_value", **counts)
    elif way == "GroupQueryAttention":
        every = add("Cast", [add("Shape", ["bias"], "all", start=3, end=4)], "all_32", to=onnx.TensorProto.INT32)
        last = add("Sub", [every, number([1], np.int32)], "last")
        ends = add("Expand", [last, add("Shape", ["query"], "batch", start=0, end=1)], "ends")
        total = add("Squeeze", [every], "total")
        inputs = ["query", "key", "value", "past_key", "past_value", ends, total, "", "", "", "bias"]
        add("GroupQueryAttention", inputs, "out", "present_key", "present_value", domain=MICROSOFT, **own)
    elif way == "MultiHeadAttention":
        merged = []
        for side in ("key", "value"):
            last = add("Transpose", [repeated(side)], f"{side}_last", perm=[0, 2, 1, 3])
            merged.append(add("Reshape", [last, number([0, 0, -1])], f"{side}_merged"))
        inputs = ["query", *merged, "", "", "bias"]
        add("MultiHeadAttention", inputs, "out", domain=MICROSOFT, num_heads=heads.queries)
    else:
        split = add("Reshape", ["query", number([0, 0, heads.queries, heads.size])], "query_split")
        first = add("Transpose", [split], "query_first", perm=[0, 2, 1, 3])
        scale = number(heads.size**-0.25, dtype)
        keys = add("Transpose", [repeated("key")], "key_turned", perm=[0, 1, 3, 2])
        sides = [add("Mul", [side, scale], f"{side}_scaled") for side in (first, keys)]
        scores = add("Add", [add("MatMul", sides, "products"), "bias"], "scores")
        mixed = add("MatMul", [add("Softmax", [scores], "shares", axis=-1), repeated("value")], "mixed")
        add("Reshape", [add("Transpose", [mixed], "mixed_back", perm=[0, 2, 1, 3]), number([0, 0, -1])], "out")
    widths = {"query": heads.queries, "key": heads.pairs, "value": heads.pairs}
    cache = {name: ["batch", heads.pairs, "cached", heads.of(name)] for name in ("past_key", "past_value")}
    given = {name: ["batch", "new", count * heads.of(name)] for name, count in widths.items()} | cache
    given["bias"] = ["batch", 1, "new", "all"]
    results = {"out": ["batch", "new", heads.queries * heads.value]}
    results |= {name: ["batch", heads.pairs, "all", heads.of(name)] for name in ("present_key", "present_value")}
    sides = [
        [helper.make_tensor_value_info(name, element, shape) for name, shape in values.items()]
        for values in (given, results)
    ]
    graph = helper.make_graph(nodes, way, *sides, weights)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def inputs_of(heads: Heads, case: Sequence[int], dtype: np.dtype[Any]) -> Arrays:
    batch, new, cached = case
    draw = np.random.default_rng(0).standard_normal
    given = {"query": draw((batch, new, heads.queries * heads.size))}
    given |= {name: draw((batch, new, heads.pairs * heads.of(name))) for name in ("key", "value")}
    given |= {name: draw((batch, heads.pairs, cached, heads.of(name))) for name in ("past_key", "past_value")}
    seen = np.arange(new + cached) <= np.arange(new)[:, None] + cached
    given["bias"] = np.broadcast_to(np.where(seen, 0.0, -1e4), (batch, 1, new, new + cached))
    return {name: np.ascontiguousarray(value.astype(dtype)) for name, value in given.items()}


class Bound:
    """A model with all it reads and puts out on the device."""

    def __init__(
        self, way: str, heads: Heads, given: dict[str, np.ndarray[Any, Any]], device: str, threads: int
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        made = model(way, heads, given["query"].dtype).SerializeToString()
        self.session = onnxruntime.InferenceSession(made, options, providers=[PROVIDERS[device]])
        self.binding = self.session.io_binding()
        for name, value in given.items():
            self.binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value, device, 0))
        for output in self.session.get_outputs():
            self.binding.bind_output(output.name, device)
        self.session.run_with_iobinding(self.binding)
        self.out = self.binding.copy_outputs_to_cpu()[0].astype(np.float32)

    def seconds(self, repeat: int) -> float:
        started = time.perf_counter()
        for _ in range(repeat):
            self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()
        return (time.perf_counter() - started) / repeat


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs=3, default=[9, 3, 64], metavar=("QUERIES", "KV", "SIZE"))
    parser.add_argument("--value-size", type=int, help="where it is not SIZE")
    parser.add_argument("--case", type=int, nargs=3, action="append", metavar=("BATCH", "NEW", "CACHED"))
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--device", choices=tuple(PROVIDERS), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=5, help="runs in a row that are timed together")
    return parser.parse_args(given)


def main() -> None:
    arguments = parse()
    if arguments.device == "cuda":
        onnxruntime.preload_dlls()
    heads = Heads(*arguments.heads, arguments.value_size or arguments.heads[-1])
    dtype = np.dtype(arguments.dtype)
    print(f"{heads}, {dtype}, {PROVIDERS[arguments.device]}, ONNX Runtime {onnxruntime.__version__}\n")
    line(COLUMNS)
    line(["---"] * len(COLUMNS))
    for case in arguments.case or [(1, 128, 0), (1, 1, 256), (4, 1, 256), (4, 7, 9)]:
        given = inputs_of(heads, case, dtype)
        ready: dict[str, Bound | str] = {}
        for way in WAYS:
            try:
                ready[way] = Bound(way, heads, given, arguments.device, arguments.threads)
            except Exception as error:
                ready[way] = str(error).rpartition("Status Message: ")[2].splitlines()[0]
        bound = {way: each for way, each in ready.items() if isinstance(each, Bound)}
        rounds = [{way: each.seconds(arguments.repeat) for way, each in bound.items()} for _ in range(arguments.rounds)]
        taken = {way: float(np.median([each[way] for each in rounds])) for way in bound}
        for way, each in ready.items():
            start = [*map(str, case), way]
            if isinstance(each, str):
                line([*start, "-", "-", f"refused: {each}"])
                continue
            gap = float(np.abs(each.out - bound["primitives"].out).max())
            line([*start, f"{1e3 * taken[way]:.3f}", f"{taken[way] / taken['primitives']:.2f}", f"{gap:.0e}"])


if __name__ == "__main__":
    main()
