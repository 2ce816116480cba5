"""A float32 ONNX file with weights of 8 or 4 bits, by ONNX Runtime's own quantisers."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir

from dotresize_fx.export.onnx_file import ONNX_FILE, WEIGHTS_FILE
from dotresize_fx.export.quiet import quiet_libraries

# Numbers of a row that share a scale and a zero point.
BLOCK = 32
# Of a tied table: one read as a head and one whose rows are picked.
BITS = {"int8": 8, "int4": 4}


def quantize(source: Path, folder: Path, kind: str, work: Path) -> Path:
    """Write the float32 file ``source`` into ``folder`` with quantised weights; returns model.onnx's path.

    ``int8``: every MatMul with a weight, a scale for each of its columns, activations quantised as they come; tables
    whose rows are picked stay float32. ``int4``: the same MatMuls and the tables, blocks of BLOCK numbers along the
    width with a scale and a zero point, activations in float32. A head that is tied to the table is quantised apart
    from it, from the same numbers. ``work`` takes what is not kept.
    """
    opened = work / f"opened-{ONNX_FILE}"
    model = onnx_ir.load(source)
    _open_tied_heads(model.graph)
    onnx_ir.save(model, opened, external_data=f"opened-{WEIGHTS_FILE}")
    path = folder / ONNX_FILE
    with quiet_libraries(), _root_logger_kept():
        (_int8 if kind == "int8" else _int4)(opened, path)
    opened.unlink()
    opened.with_name(f"opened-{WEIGHTS_FILE}").unlink(missing_ok=True)
    return path


def _open_tied_heads(graph: onnx_ir.Graph) -> None:
    """A weight that is transposed as the model runs becomes one of its own: a quantiser sees no other."""
    for node in list(graph):
        (weight, *_), (turned, *_) = node.inputs, node.outputs
        if node.op_type != "Transpose" or weight is None or weight.name not in graph.initializers:
            continue
        tensor = weight.const_value
        assert tensor is not None
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(tensor.shape))[::-1]
        shape = onnx_ir.Shape([tensor.shape[axis] for axis in order])
        name = f"{weight.name}_transposed"
        lazy = onnx_ir.LazyTensor(_transposed(tensor, tuple(order)), dtype=tensor.dtype, shape=shape, name=name)
        value = onnx_ir.Value(name=name, const_value=lazy, type=weight.type, shape=shape)
        graph.register_initializer(value)
        turned.replace_all_uses_with(value)
        graph.remove(node, safe=True)


def _transposed(tensor: onnx_ir.TensorProtocol, order: tuple[int, ...]):
    return lambda: onnx_ir.Tensor(np.ascontiguousarray(tensor.numpy().transpose(order)))


def _int8(source: Path, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        path,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=reduces_range(),
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )


def reduces_range() -> bool:
    """Whether weights take 7 bits: without VNNI, x86 adds two products of 8 bits in 16, where they saturate."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return True
    return "avx512_vnni" not in flags and "avx_vnni" not in flags


def _int4(source: Path, path: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(source),
        bits=4,
        block_size=BLOCK,
        is_symmetric=False,
        accuracy_level=ACC,
        op_types_to_quantize=OPS,
    )
    quantizer.process()
    onnx.save(
        quantizer.model.model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=WEIGHTS_FILE
    )

ACC=None
OPS=("MatMul", "Gather")

@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """The quantiser of ONNX Runtime sets the root logger up, on import, to tell of every node."""
    root = logging.getLogger()
    level, handlers, off = root.level, list(root.handlers), logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(off)
        root.setLevel(level)
        root.handlers[:] = handlers
