"""A float32 ONNX file with weights of 8 or 4 bits, by ONNX Runtime's own quantiser of weights.

Its dynamic quantiser (``quantize_dynamic``) is not taken for 8 bits: it also rounds activations, with one scale for all
of them, and the few large ones that language models have leave the others no digits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir

from dotresize_fx.export.onnx_file import ONNX_FILE, WEIGHTS_FILE
from dotresize_fx.export.quiet import quiet_libraries

# Numbers of a weight, along what a product sums over, that share a scale and a zero point.
BLOCK = 32
# By kind: bits, and which nodes. The quantiser has tables whose rows are picked in 4 bits alone. A head has 8 in both:
# it is the last to speak, and one of few.
KINDS = {"int8": (8, ("MatMul",)), "int4": (4, ("MatMul", "Gather"))}
HEAD_BITS = 8
# Products in integers, each block of activations with a scale of its own.
ACCURACY_LEVEL = 4
QUANTISED_PRODUCT = "MatMulNBits"
_OPENED = "opened.onnx"


@dataclass(frozen=True)
class Quantised:
    """``path`` of model.onnx; of its ``linears``, products with a weight, so many are ``quantised``."""

    path: Path
    linears: int
    quantised: int


def quantize(source: Path, folder: Path, kind: str, work: Path) -> Quantised:
    """Write the float32 file ``source`` into ``folder`` with the weights that ``kind``, of KINDS, says.

    A head that is tied to the table of embeddings is quantised apart from it, from the same numbers. What stays float32
    are norms, biases, convolutions, products with more than one matrix (experts), and for int8 the table. ``int4``
    leaves 8 bits to the product that is an output of the graph. ``work`` takes what is not kept.
    """
    opened = work / _OPENED
    model = onnx_ir.load(source)
    _open_tied_heads(model.graph)
    onnx_ir.save(model, opened, external_data=f"{_OPENED}.data")
    path = folder / ONNX_FILE
    with quiet_libraries(), _root_logger_kept():
        found = _quantised(onnx.load(opened), kind)
    opened.unlink()
    opened.with_name(f"{_OPENED}.data").unlink()
    quantised = sum(node.op_type == QUANTISED_PRODUCT for node in found.graph.node)
    weights = {tensor.name for tensor in found.graph.initializer}
    left = sum(node.op_type in ("MatMul", "Gemm") and node.input[1] in weights for node in found.graph.node)
    onnx.save(found, path, save_as_external_data=True, all_tensors_to_one_file=True, location=WEIGHTS_FILE)
    return Quantised(path, left + quantised, quantised)


def _quantised(model: onnx.ModelProto, kind: str) -> onnx.ModelProto:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    bits, ops = KINDS[kind]
    outputs = {value.name for value in model.graph.output}
    heads = [node.name for node in model.graph.node if node.op_type == "MatMul" and outputs.intersection(node.output)]
    for step_bits, step_ops, kept in ((bits, ops, heads), (HEAD_BITS, ("MatMul",), [])):
        quantizer = MatMulNBitsQuantizer(
            model,
            bits=step_bits,
            block_size=BLOCK,
            is_symmetric=False,
            accuracy_level=ACCURACY_LEVEL,
            nodes_to_exclude=kept,
            op_types_to_quantize=step_ops,
        )
        quantizer.process()
        model = quantizer.model.model
    return model


def _open_tied_heads(graph: onnx_ir.Graph) -> None:
    """A weight that is transposed as the model runs becomes one of its own: the quantiser sees no other."""
    for node in list(graph):
        weight, turned = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Transpose" or weight is None or weight.const_value is None:
            continue
        tensor = weight.const_value
        given = node.attributes.get("perm")
        order = tuple(range(len(tensor.shape)))[::-1] if given is None else tuple(given.as_ints())
        numbers = tensor.shape.numpy()
        shape = onnx_ir.Shape([numbers[axis] for axis in order])
        name = f"{weight.name}_transposed"
        lazy = onnx_ir.LazyTensor(_transposed(tensor, order), dtype=tensor.dtype, shape=shape, name=name)
        value = onnx_ir.Value(name=name, const_value=lazy, type=weight.type, shape=shape)
        graph.register_initializer(value)
        turned.replace_all_uses_with(value)
        graph.remove(node, safe=True)


def _transposed(tensor: onnx_ir.TensorProtocol, order: tuple[int, ...]) -> Callable[[], onnx_ir.TensorProtocol]:
    return lambda: onnx_ir.Tensor(np.ascontiguousarray(tensor.numpy().transpose(order)))


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """The quantiser tells of every node, and on import sets the root logger up to show it."""
    root = logging.getLogger()
    level, handlers, disabled = root.level, list(root.handlers), root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers
