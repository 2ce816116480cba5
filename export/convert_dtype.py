"""A float32 ONNX file in half precision: weights and what flows between them, with what is delicate left in float32.

ONNX Runtime's own converter knows float16 alone, holds the whole model in memory and rounds the mean squares of a norm
before its epsilon is added. Here each weight is read, rounded and written by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir
from onnx_ir.passes.common import ShapeInferencePass

from dotresize_fx.errors import UsageError
from dotresize_fx.export.onnx_file import ONNX_FILE, WEIGHTS_FILE

HALF = {"float16": onnx_ir.DataType.FLOAT16, "bfloat16": onnx_ir.DataType.BFLOAT16}
_LARGEST = {"float16": float(np.finfo(np.float16).max), "bfloat16": 2.0**127 * (2 - 2**-7)}
FLOAT = onnx_ir.DataType.FLOAT
# Sums of many terms, squares, exponentials and angles. LayerNormalization keeps its own statistics in float32.
EXACT = {"Pow", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Sqrt", "Reciprocal", "Exp", "Log", "Cos"}
EXACT |= {"Sin", "Softmax", "LogSoftmax", "Range", "CumSum", "TopK"}
# Comparisons: exact for nothing, and for bfloat16 ONNX Runtime has none.
EXACT |= {"Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"}
ANGLES = {"Cos", "Sin"}
ROOTS = {"Sqrt", "Reciprocal"}
# What computes each number from those at its place, or moves it: exact where all that read it are.
LIGHT = {"Add", "Sub", "Mul", "Div", "Where", "Cast", "Neg", "Abs", "Max", "Min", "Clip", "Unsqueeze", "Squeeze"}
LIGHT |= {"Expand", "Reshape", "Transpose", "Concat", "Slice", "Tanh", "Identity"}
# What reads a residual stream; some add to it as well.
NORMS = {"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"}
NORMS |= {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}


def convert_dtype(source: Path, folder: Path, dtype: str, *, exact_stream: bool = False) -> Path:
    """Write the float32 file ``source`` into ``folder`` in ``dtype``, a key of HALF; returns model.onnx's path.

    Norms (but for the gain), softmax with what is added to its scores, and rotary angles stay in float32. Float inputs
    and outputs become float16; with bfloat16, which numpy and so ONNX Runtime's Python lack, they stay float32.
    ``exact_stream`` keeps the residual stream in float32 too, for casts around every sublayer: in some models it grows
    by hundreds and shrinks again, and what was rounded in between is then large beside what is left.

    Raises:
        UsageError: the graph has a loop or a branch, whose bodies are not converted, or a value of unknown type.
    """
    model = onnx_ir.load(source)
    if any(value.type is None for node in model.graph for value in node.outputs):
        ShapeInferencePass()(model)
    _Conversion(model.graph, dtype, exact_stream).run()
    path = folder / ONNX_FILE
    onnx_ir.save(model, path, external_data=WEIGHTS_FILE)
    return path


class _Conversion:
    def __init__(self, graph: onnx_ir.Graph, dtype: str, exact_stream: bool) -> None:
        self.graph, self.name, self.half = graph, dtype, HALF[dtype]
        self.outer = self.half if dtype == "float16" else FLOAT
        for node in graph:
            if any(value.type in _GRAPHS for value in node.attributes.values()):
                raise UsageError(f"--dtype {dtype}: the graph has a {node.op_type}, which stays float32: leave it out")
            for value in node.outputs:
                if not isinstance(value.type, onnx_ir.TensorType) and value.uses():
                    raise UsageError(f"--dtype {dtype}: nothing tells the type of {value.name}: leave it out")
        self.exact = self._exact_nodes(exact_stream)
        self.casts: dict[tuple[onnx_ir.Value, onnx_ir.DataType], onnx_ir.Value] = {}

    def run(self) -> None:
        floats = {value for value in self._values() if value.dtype == FLOAT}
        weights = [value for value in self.graph.initializers.values() if value.dtype == FLOAT]
        nodes = list(self.graph)  # those that are there before any cast is
        for value in floats:
            value.dtype = self._own(value)
        for node in nodes:
            if node not in self.exact:
                self._retype(node)
        for weight in weights:
            self._split(weight)
        for node in nodes:
            wanted = FLOAT if node in self.exact else self.half
            for index, read in enumerate(node.inputs):
                if read is not None and read in floats and read.dtype != wanted:
                    node.replace_input_with(index, self._cast(read, wanted))
        for index, value in enumerate(self.graph.outputs):
            if value in floats and value.dtype != self.outer:
                name, inner = value.name, self._cast(value, self.outer)
                value.name = f"{name}_before_cast"
                inner.name, inner.shape = name, value.shape
                self.graph.outputs[index] = inner

    def _exact_nodes(self, exact_stream: bool) -> set[onnx_ir.Node]:
        exact = {node for node in self.graph if node.op_type in EXACT}
        if exact_stream:
            exact |= self._stream()
        exact |= {reader for node in exact if node.op_type in ROOTS for reader in _readers(node, ("Mul", "Div"))}
        pending = [node for node in exact if node.op_type in ANGLES]
        while pending:  # everything that an angle is made of
            floats = [value for value in pending.pop().inputs if value is not None and value.dtype == FLOAT]
            before = {node for value in floats if (node := value.producer()) is not None}
            pending += before - exact
            exact |= before
        outputs = set(self.graph.outputs)
        for node in reversed(self.graph):
            readers = [use.node for value in node.outputs for use in value.uses()]
            light = node.op_type in LIGHT and not outputs.intersection(node.outputs)
            if light and readers and all(reader in exact for reader in readers):
                exact.add(node)
        return exact

    def _stream(self) -> set[onnx_ir.Node]:
        """Norms, and sums of two activations that one of them, however it is spelled, or the next such sum reads."""
        found = {node for node in self.graph if node.op_type in NORMS}
        for node in reversed(self.graph):
            added = node.op_type == "Add" and all(value and value.const_value is None for value in node.inputs)
            readers = {use.node for value in node.outputs for use in value.uses()}
            if added and any(reader in found or reader.op_type in ("Pow", "ReduceMean") for reader in readers):
                found.add(node)
        return found

    def _values(self) -> Iterator[onnx_ir.Value]:
        yield from self.graph.inputs
        for node in self.graph:
            yield from node.outputs

    def _own(self, value: onnx_ir.Value) -> onnx_ir.DataType:
        """The type in which a value comes about."""
        if value.producer() is None:
            return self.outer
        return FLOAT if value.producer() in self.exact else self.half

    def _retype(self, node: onnx_ir.Node) -> None:
        """Say the new type where a node has the type of its result, or the result itself, as an attribute."""
        for key, attribute in list(node.attributes.items()):
            if key in ("to", "dtype") and attribute.value == FLOAT:
                node.attributes[key] = onnx_ir.AttrInt64(key, int(self.half))
            elif attribute.type == onnx_ir.AttributeType.TENSOR and attribute.value.dtype == FLOAT:
                rounded = self._rounded(attribute.value)
                node.attributes[key] = onnx_ir.AttrTensor(key, onnx_ir.Tensor(rounded, name=attribute.value.name))

    def _split(self, weight: onnx_ir.Value) -> None:
        """Round a weight; what exact nodes read of it stays, under a name of its own where others read it too."""
        uses = [(use.node, use.idx) for use in weight.uses()]
        coarse = [(node, index) for node, index in uses if node not in self.exact]
        if not coarse:
            return
        tensor = weight.const_value
        assert tensor is not None
        if len(coarse) < len(uses):
            kept = onnx_ir.Value(
                name=f"{weight.name}_float32", const_value=tensor, type=onnx_ir.TensorType(FLOAT), shape=weight.shape
            )
            self.graph.register_initializer(kept)
            for node, index in uses:
                if node in self.exact:
                    node.replace_input_with(index, kept)
        weight.const_value = onnx_ir.LazyTensor(
            lambda: onnx_ir.Tensor(self._rounded(tensor), dtype=self.half),
            dtype=self.half,
            shape=onnx_ir.Shape(tensor.shape.numpy()),
            name=weight.name,
        )
        weight.dtype = self.half

    def _rounded(self, tensor: onnx_ir.TensorProtocol) -> np.ndarray:
        """What is finite stays so: a mask's least float32 becomes the least number that there is."""
        numbers, largest = tensor.numpy(), _LARGEST[self.name]
        finite = np.where(np.isinf(numbers), numbers, np.clip(numbers, -largest, largest))
        return finite.astype(self.half.numpy())

    def _cast(self, value: onnx_ir.Value, wanted: onnx_ir.DataType) -> onnx_ir.Value:
        if (value, wanted) not in self.casts:
            node = onnx_ir.node("Cast", [value], {"to": int(wanted)}, name=f"{value.name}_to_{wanted.name.lower()}")
            (result,) = node.outputs
            result.name, result.dtype, result.shape = node.name, wanted, value.shape
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], node)
            else:
                self.graph.insert_after(producer, node)
            self.casts[value, wanted] = result
        return self.casts[value, wanted]


_GRAPHS = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)


def _readers(node: onnx_ir.Node, kinds: tuple[str, ...]) -> Iterator[onnx_ir.Node]:
    return (use.node for value in node.outputs for use in value.uses() if use.node.op_type in kinds)
