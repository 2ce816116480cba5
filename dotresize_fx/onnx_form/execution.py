"""Run an ONNX graph in pieces in ONNX Runtime, so that one block's activations are in flight and not the whole model's.

Activations stay the runtime's own values from piece to piece, on its device. What is summed over them is summed by
nodes behind the piece (:mod:`dotresize_fx.onnx_form.gram_nodes`) and leaves as small arrays. Weights are fed as inputs
that share the model's memory: no session holds a copy of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import onnx_ir as ir
import torch

from dotresize_fx.onnx_form.constants import constant, is_constant_node
from dotresize_fx.onnx_form.gram_nodes import GramNodes
from dotresize_fx.onnx_form.piece import Environment, Piece, reads_of
from dotresize_fx.onnx_form.runtime_values import from_runtime, to_runtime
from dotresize_fx.onnx_form.start import at_start, is_past

# Constants of so many bytes are fed; smaller ones are sizes, axes and numbers that the runtime wants to see.
FED = 2048


class OnnxExecution:
    """The nodes of a graph in order, without those that follow from constants alone: these are run where they are read.

    The graph must not be edited between construction and use. ``device`` is cpu or cuda.
    """

    def __init__(self, graph: Any, device: str = "cpu") -> None:
        self.graph, self.device = graph, device
        self.model: ir.Model = graph.model
        main = self.model.graph
        self.constants: dict[str, ir.TensorProtocol] = {
            str(name): value.const_value for name, value in main.initializers.items() if value.const_value is not None
        }
        self.inputs = [str(value.name) for value in main.inputs if value.name not in self.constants]
        self.results = [str(value.name) for value in main.outputs]
        self.order = {node: i for i, node in enumerate(main)}
        self.nodes: list[ir.Node] = []
        self.reads: list[frozenset[str]] = []
        self._static: dict[str, ir.Node] = {}
        for node in main:
            if is_constant_node(node) and _is_fed(stored := constant(node.outputs[0])):
                self.constants[str(node.outputs[0].name)] = stored
                continue
            read = reads_of(node)
            if not node.op_type.startswith("Random") and all(n in self.constants or n in self._static for n in read):
                self._static |= {str(output.name): node for output in node.outputs if output.name}
                continue
            self.nodes.append(node)
            self.reads.append(read)
        self._position = {str(o.name): i for i, node in enumerate(self.nodes) for o in node.outputs if o.name}
        self._last_use: dict[str, int] = {}
        for i, read in enumerate(self.reads):
            self._last_use |= dict.fromkeys(read, i)

    def position(self, name: str) -> int:
        """Which of the nodes puts out this value; -1 for one that is there from the start."""
        return self._position.get(name, -1)

    def needed_behind(self, stop: int) -> list[str]:
        """What nodes before ``stop``, or the inputs, give and nodes from there on read."""
        names = [*self.inputs, *self._position]
        return [name for name in names if self.position(name) < stop <= self._last_use.get(name, -1)]

    def live_behind(self, stop: int, held: Iterable[str]) -> list[str]:
        """Those, and of ``held`` what is there by then."""
        return list(dict.fromkeys([*self.needed_behind(stop), *(n for n in held if self.position(n) < stop)]))

    def start(self, inputs: Mapping[str, torch.Tensor]) -> Environment:
        """An environment with the graph's inputs."""
        return {name: to_runtime(tensor, self.device) for name, tensor in self.completed(inputs).items()}

    def empty_cache(self, inputs: Mapping[str, torch.Tensor]) -> Environment:
        """The graph's caches, where they are not given."""
        given = {str(value.name): value for value in self.model.graph.inputs if is_past(str(value.name))}
        empty = {name: at_start(value, inputs) for name, value in given.items() if name not in inputs}
        return {name: to_runtime(tensor, self.device) for name, tensor in empty.items()}

    def completed(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All inputs of the graph: a cache that is not given is empty, see :func:`at_start`.

        What is bfloat16 may be given in float32, since there are no arrays of it.
        """
        given = {str(value.name): value for value in self.model.graph.inputs}
        whole = {name: inputs[name] if name in inputs else at_start(given[name], inputs) for name in self.inputs}
        coarse = {name for name in whole if given[name].dtype == ir.DataType.BFLOAT16}
        return {name: tensor.bfloat16() if name in coarse else tensor for name, tensor in whole.items()}

    def piece(
        self,
        start: int,
        stop: int,
        outputs: Iterable[str],
        sums: GramNodes | None = None,
        overrides: Mapping[str, torch.Tensor] | None = None,
        available: Iterable[str] | None = None,
    ) -> Piece:
        """What gives these values, and these sums, of nodes ``start`` to ``stop`` (exclusive).

        ``overrides`` stand in for constants, by name and as they are stored. Of what earlier nodes gave all is there,
        or what is ``available``: the rest is computed anew.
        """
        there = None if available is None else frozenset(available)
        return Piece(self, start, stop, list(dict.fromkeys(outputs)), sums, dict(overrides or {}), there)

    def outputs(
        self, inputs: Mapping[str, torch.Tensor], overrides: Mapping[str, torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Run everything; the graph's outputs in their order."""
        return self.whole(overrides)(inputs)

    def whole(self, overrides: Mapping[str, torch.Tensor] | None = None, first: bool = False) -> Whole:
        """All of the graph as a function, or what its first output takes."""
        return Whole(self, self.results[:1] if first else self.results, overrides)

    def width(self, name: str) -> int | None:
        """The last size that the graph states of a value; None where it states none."""
        sizes = self.graph.shape_of(name) if name in self._position or name in self.inputs else ()
        return sizes[-1] if sizes and isinstance(sizes[-1], int) else None

    def feeds(self, name: str) -> bool:
        """Whether a constant is fed to a session that reads it."""
        return _is_fed(self.constants[name])

    def is_static(self, name: str) -> bool:
        """Whether a value follows from constants."""
        return name in self._static

    def producer(self, name: str) -> ir.Node:
        """The node that puts out a value."""
        return self._static[name] if name in self._static else self.nodes[self._position[name]]


FEEDABLE = {
    *(ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE, ir.DataType.BOOL),
    *(ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64),
}


def _is_fed(tensor: ir.TensorProtocol | None) -> TypeGuard[ir.TensorProtocol]:
    return tensor is not None and tensor.nbytes > FED and tensor.dtype in FEEDABLE


class Whole:
    """A graph as a function of inputs by name; its session is made once."""

    def __init__(self, execution: OnnxExecution, names: Sequence[str], overrides: Mapping[str, torch.Tensor] | None):
        self._execution, self._names = execution, names
        self._piece = execution.piece(0, len(execution.nodes), names, None, overrides)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        values, _ = self._piece.run(self._execution.start(inputs))
        return [from_runtime(values[name]) for name in self._names]
