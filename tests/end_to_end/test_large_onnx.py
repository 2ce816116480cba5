"""ONNX files of more than a gigabyte: what slimming one holds in memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from dotresize_fx.export.onnx_file import onnx_size

WIDTH, INNER, VOCABULARY = 16384, 512, 300
GIGABYTE = 1e9
AT_MOST = 2.5  # times the weights
STATUS = Path("/proc/self/status")


def wide_model(path: Path, blocks: int, *, beside: bool) -> None:
    """67 MB a block, ``x + down(relu(up(norm(x))))``; cheap numbers: a random row, moved on by one for each next."""
    rng = np.random.default_rng(0)
    nodes: list[ir.Node] = []
    constants: list[ir.Value] = []

    def constant(name: str, *sizes: int, scale: float = 1.0) -> ir.Value:
        row = rng.standard_normal(sizes[0] + sizes[-1]).astype(np.float32) * np.float32(scale)
        array = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(row, sizes[-1])[: sizes[0]])
        tensor = ir.tensor(array if len(sizes) > 1 else row[: sizes[0]], name=name)
        constants.append(ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)))
        return constants[-1]

    def node(op: str, *inputs: ir.Value) -> ir.Value:
        output = ir.Value(name=f"{op}.{len(nodes)}")
        nodes.append(ir.node(op, inputs, outputs=[output], name=output.name))
        return output

    ids = ir.Value(name="ids", shape=ir.Shape(["batch", "length"]), type=ir.TensorType(ir.DataType.INT64))
    x = node("Gather", constant("table", VOCABULARY, WIDTH), ids)
    for i in range(blocks):
        normed = node("LayerNormalization", x, constant(f"{i}.gain", WIDTH), constant(f"{i}.shift", WIDTH))
        product = node("MatMul", normed, constant(f"{i}.up.weight", WIDTH, INNER, scale=WIDTH**-0.5))
        hidden = node("Relu", node("Add", product, constant(f"{i}.up.bias", INNER)))
        x = node("Add", x, node("MatMul", hidden, constant(f"{i}.down.weight", INNER, WIDTH, scale=INNER**-0.5)))
    x.shape, x.type = ir.Shape(["batch", "length", WIDTH]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([ids], [x], nodes=nodes, initializers=constants, opset_imports={"": 18}, name="wide")
    ir.save(ir.Model(graph, ir_version=9), path, external_data="wide.data" if beside else None)
    np.savez(path.parent / "inputs.npz", ids=rng.integers(0, VOCABULARY, (40, 8)))


def own_memory(process: int) -> float:
    """Bytes that a process holds beside mapped files; 0 once it is gone."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0.0
    return 1024.0 * int(found[1]) if found else 0.0


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="reads Linux's record of a process's memory")
@pytest.mark.parametrize(("blocks", "beside"), [(38, True), (16, False)])
def test_memory_stays_below_a_bound(blocks: int, beside: bool, tmp_path: Path) -> None:
    """2.5 GB beside the file, 1.1 GB inside it: minutes, and of disk four times that."""
    model, out = tmp_path / "wide.onnx", tmp_path / "out"
    wide_model(model, blocks, beside=beside)
    weights = onnx_size(model)
    assert weights > (2.5 if beside else 1.0) * GIGABYTE
    command = [sys.executable, "-m", "dotresize_fx", "export", str(model), str(out)]
    command += ["--calibration-data", str(tmp_path / "inputs.npz"), "--method", "obs", "--allocation", "uniform"]
    peak = 0.0
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}) as process:
        while process.poll() is None:
            peak = max(peak, own_memory(process.pid))
            time.sleep(0.02)
    assert process.returncode == 0
    print(f"peak {peak / GIGABYTE:.2f} GB, {peak / weights:.2f} times the weights")
    assert peak <= AT_MOST * weights
    assert onnx_size(out / "model.onnx") < 0.85 * weights
