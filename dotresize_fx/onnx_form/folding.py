"""Store what follows from fixed sizes and from parameters alone as constants of the graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator

from dotresize_fx.onnx_form.constants import constant, is_constant_node
from dotresize_fx.onnx_form.edits import OnnxEditor
from dotresize_fx.onnx_form.moves import stated_sizes
from dotresize_fx.onnx_form.symbolic_shapes import SymbolicShapes

FOLDED = (
    "Add", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather", "Identity", "Mul", "Neg",
    "Pow", "Range", "Reciprocal", "ReduceProd", "Reshape", "Slice", "Sqrt", "Squeeze", "Sub", "Unsqueeze", "Where",
)  # fmt: skip
ROUNDS = 4  # what is folded may be the bounds of a slice, whose size is then known


def fold_constants(graph: ir.Graph, editor: OnnxEditor, largest: int) -> list[str]:
    """Numbers and vectors that shapes or parameters alone decide become initializers; at most ``largest`` numbers each.

    A size that an exporter reads from a tensor where it could have written it down is then written down, and follows
    no more what it was read from.
    """
    folded: list[str] = []
    for _ in range(ROUNDS):
        walk = SymbolicShapes(graph)
        walk.run()
        found = _fold(graph, editor, walk, largest)
        folded += found
        if not found:
            break
    for node in [node for node in graph if node.op_type in ("Reshape", "Expand") and node.domain == ""]:
        folded += _state_target(editor, node, walk)
    return folded


def _fold(graph: ir.Graph, editor: OnnxEditor, walk: SymbolicShapes, largest: int) -> list[str]:
    folded = []
    for node in list(graph):
        if is_constant_node(node) or node.domain != "" or len(node.outputs) != 1:
            continue
        output = node.outputs[0]
        if output.is_graph_output() or output.shape is None or len(output.shape) > 1 or not output.uses():
            continue
        found = _of_sizes(walk, output)
        if found is None and node.op_type in FOLDED:
            found = _computed(graph, node, largest)
        if found is not None:
            new = editor.add_initializer(f"{output.name}_folded", torch.from_numpy(np.array(found)))
            output.replace_all_uses_with(new)
            folded.append(f"{output.name}: computed once")
    return folded


def _state_target(editor: OnnxEditor, node: ir.Node, walk: SymbolicShapes) -> list[str]:
    """Let a computed target state the sizes in it that are known; the others are picked from what is computed."""
    target, sizes, stated = node.inputs[1], walk.known(node.inputs[1]), stated_sizes(node.inputs[1])
    if target is None or sizes is None or stated is None or len(sizes) != len(stated):
        return []
    if all(said is not None or isinstance(size, str) for size, said in zip(sizes, stated, strict=True)):
        return []
    if all(isinstance(size, int) for size in sizes):
        node.replace_input_with(1, editor.add_initializer(f"{target.name}_stated", torch.tensor(sizes)))
        return [f"{node.outputs[0].name}: its sizes stated"]
    parts = []
    for place, size in enumerate(sizes):
        stored = editor.add_initializer(
            f"{target.name}_{place}", torch.tensor([size if isinstance(size, int) else place])
        )
        if isinstance(size, str):
            picked = ir.val(editor.fresh(f"{target.name}_picked"), ir.DataType.INT64, [1])
            editor.insert("Gather", [target, stored], picked, {"axis": 0}, before=node)
        parts.append(stored if isinstance(size, int) else picked)
    whole = ir.val(editor.fresh(f"{target.name}_stated"), ir.DataType.INT64, [len(sizes)])
    editor.insert("Concat", parts, whole, {"axis": 0}, before=node)
    node.replace_input_with(1, whole)
    return [f"{node.outputs[0].name}: its sizes stated"]


def _of_sizes(walk: SymbolicShapes, output: ir.Value) -> np.ndarray[Any, Any] | None:
    sizes = walk.numbers.get(output)
    if sizes is None or not all(isinstance(size, int) for size in sizes) or output.dtype is None:
        return None
    numbers = np.array(sizes, output.dtype.numpy())
    assert output.shape is not None
    return numbers.reshape(()) if len(output.shape) == 0 else numbers


def _computed(graph: ir.Graph, node: ir.Node, largest: int) -> np.ndarray[Any, Any] | None:
    """What a node computes from small constants; None where it reads anything else, or cannot be run here."""
    stored = {str(value.name): constant(value) for value in node.inputs if value is not None}
    feeds = {name: tensor.numpy() for name, tensor in stored.items() if tensor is not None and tensor.size <= largest}
    if not stored or len(feeds) < len(stored) or any(array.ndim > 1 for array in feeds.values()):
        return None
    try:
        results: Any = ReferenceEvaluator(ir.to_proto(node), opsets=dict(graph.opset_imports)).run(None, feeds)
    except Exception:  # whatever the evaluator makes of an op or a dtype it does not know
        return None
    (found,) = results
    plain = isinstance(found, np.ndarray) and found.dtype.kind in "biuf"  # no text, none of the types numpy lacks
    return found if plain and found.size <= largest and found.ndim < 2 else None
