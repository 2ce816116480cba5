"""Run an ONNX graph in pieces in ONNX Runtime, so that one block's activations are in flight and not the whole model's.

Activations stay the runtime's own values from piece to piece, on its device. What is summed over them is summed by
nodes behind the piece (:mod:`dotresize_fx.onnx_form.gram_nodes`) and leaves as small arrays. Weights are fed as inputs
that share the model's memory: no session holds a copy of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx import helper

from dotresize_fx.errors import MissingExtraError, OnnxRuntimeError, OutOfMemoryError
from dotresize_fx.onnx_form.gram_nodes import ROW_MASK, GramNodes, Sums
from dotresize_fx.onnx_form.kinds import bodies
from dotresize_fx.onnx_form.runtime_values import RuntimeValue, constant_to_runtime, from_runtime, to_runtime

# Value name -> the runtime's own value.
Environment = dict[str, RuntimeValue]
# Constants of so many bytes are fed; smaller ones are sizes, axes and numbers that the runtime wants to see.
FED = 2048
_NO_ROOM = ("Failed to allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")


class OnnxExecution:
    """The nodes of a graph in order, without those that follow from constants alone: these are run where they are read.

    The graph must not be edited between construction and use. ``device`` is cpu or cuda.
    """

    def __init__(self, graph: Any, device: str = "cpu") -> None:
        self.graph, self.device = graph, device
        self.model: ir.Model = graph.model
        main = self.model.graph
        self.constants = {
            str(name): value for name, value in main.initializers.items() if value.const_value is not None
        }
        self.inputs = [str(value.name) for value in main.inputs if value.name not in self.constants]
        self.results = [str(value.name) for value in main.outputs]
        self.nodes: list[ir.Node] = []
        self.reads: list[frozenset[str]] = []
        self._static: dict[str, ir.Node] = {}
        for node in main:
            read = _reads(node)
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

    def start(self, inputs: Mapping[str, torch.Tensor]) -> Environment:
        """An environment with the graph's inputs."""
        return {name: to_runtime(inputs[name], self.device) for name in self.inputs}

    def piece(
        self,
        start: int,
        stop: int,
        outputs: Iterable[str],
        sums: GramNodes | None = None,
        overrides: Mapping[str, torch.Tensor] | None = None,
    ) -> Piece:
        """What gives these values, and these sums, of nodes ``start`` to ``stop`` (exclusive).

        ``overrides`` stand in for constants, by name and as they are stored.
        """
        return Piece(self, start, stop, list(dict.fromkeys(outputs)), sums, dict(overrides or {}))

    def outputs(
        self, inputs: Mapping[str, torch.Tensor], overrides: Mapping[str, torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Run everything; the graph's outputs in their order."""
        return self.whole(overrides)(inputs)

    def whole(self, overrides: Mapping[str, torch.Tensor] | None = None, first: bool = False) -> Whole:
        """All of the graph as a function, or what its first output takes."""
        return Whole(self, self.results[:1] if first else self.results, overrides)

    def feeds(self, name: str) -> bool:
        """Whether a constant is fed to a session that reads it."""
        tensor = self.constants[name].const_value
        assert tensor is not None
        return tensor.nbytes > FED and tensor.dtype in FEEDABLE

    def static(self, name: str) -> ir.Node:
        """The node behind a value that follows from constants."""
        return self._static[name]


FEEDABLE = {
    *(ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE, ir.DataType.BOOL),
    *(ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64),
}


class Whole:
    """A graph as a function of inputs by name; its session is made once."""

    def __init__(self, execution: OnnxExecution, names: Sequence[str], overrides: Mapping[str, torch.Tensor] | None):
        self._execution, self._names = execution, names
        self._piece = execution.piece(0, len(execution.nodes), names, None, overrides)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        values, _ = self._piece.run(self._execution.start(inputs))
        return [from_runtime(values[name]) for name in self._names]


class Piece:
    """Some nodes of a graph as a session of their own, which is made when it is first run."""

    def __init__(
        self,
        execution: OnnxExecution,
        start: int,
        stop: int,
        outputs: list[str],
        sums: GramNodes | None,
        overrides: dict[str, torch.Tensor],
    ) -> None:
        self._execution, self._sums, self._outputs = execution, sums, outputs
        needed = {*outputs, *(sums.reads if sums else ())}
        chosen: list[ir.Node] = []
        made: set[str] = set()
        for i in range(stop - 1, start - 1, -1):
            names = {str(output.name) for output in execution.nodes[i].outputs if output.name}
            if names & needed:
                chosen.append(execution.nodes[i])
                made |= names
                needed |= execution.reads[i]
        self._read: list[str] = []  # of the environment
        self._weights: dict[str, RuntimeValue] = {}
        self._inline: list[onnx.TensorProto] = []
        first: list[ir.Node] = []
        waiting, seen = sorted(needed - made), set(made)
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in overrides:  # what it is, or follows from, stands back
                self._weights[name] = to_runtime(overrides[name], execution.device)
            elif name in execution.constants:
                self._add_constant(name)
            elif name in execution._static:
                first.append(execution.static(name))
                waiting += sorted(_reads(first[-1]))
            else:
                self._read.append(name)
        order = {node: i for i, node in enumerate(execution.model.graph)}
        self._nodes = sorted({*first, *chosen}, key=order.__getitem__)
        self._made = {str(output.name) for node in self._nodes for output in node.outputs if output.name}
        self._session: Any = None

    def _add_constant(self, name: str) -> None:
        tensor = self._execution.constants[name].const_value
        assert tensor is not None
        if self._execution.feeds(name):
            self._weights[name] = constant_to_runtime(tensor, self._execution.device)
            return
        small = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
        self._inline.append(ir.serde.serialize_tensor(small))

    def run(
        self,
        environment: Environment,
        mask: torch.Tensor | None = None,
        extra: Mapping[str, RuntimeValue] | None = None,
    ) -> tuple[Environment, Sums]:
        """(the outputs, what was summed). ``mask`` (batch, length) is not 0 at rows that count; None: all do.

        ``extra`` are values that the sums read beside the graph's own.
        """
        given = {**environment, **(extra or {})}
        fed = {name: given[name] for name in self._read} | self._weights
        if self._sums is not None:
            row_mask = torch.ones(1) if mask is None else (mask.reshape(-1) != 0).float()
            fed[ROW_MASK] = to_runtime(row_mask, self._execution.device)
        computed = [name for name in self._outputs if name in self._made]
        names = [*computed, *(self._sums.outputs if self._sums else ())]
        found: dict[str, RuntimeValue] = {}
        if names:
            try:
                self._session = self._session or self._open(fed, names)
                found = self._run(fed, computed, names)
            except MissingExtraError:
                raise
            except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
                raise _failed(error) from error
        values = {name: found[name] if name in found else fed[name] for name in self._outputs}
        return values, self._sums.read(found) if self._sums else {}

    def _run(self, fed: Environment, computed: Sequence[str], names: Sequence[str]) -> Environment:
        binding = self._session.io_binding()
        for name, value in fed.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, self._execution.device if name in computed else "cpu")
        self._session.run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs(), strict=True))

    def _open(self, fed: Environment, names: Sequence[str]) -> Any:
        runtime = onnx_runtime()
        model = self._execution.model
        inputs = [
            helper.make_tensor_value_info(name, value.element_type(), [None] * len(value.shape()))
            for name, value in fed.items()
        ]
        nodes = [ir.serde.serialize_node(node) for node in self._nodes]
        outputs = [onnx.ValueInfoProto(name=name) for name in names]
        inline = list(self._inline)
        if self._sums is not None:
            nodes += self._sums.nodes
            inline += self._sums.constants
        proto = helper.make_model(
            helper.make_graph(nodes, "piece", inputs, outputs, inline),
            opset_imports=[helper.make_opsetid(domain, number) for domain, number in model.opset_imports.items()],
            functions=[ir.serde.serialize_function(function) for function in model.functions.values()],
            ir_version=model.ir_version,
        )
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        provider = "CUDAExecutionProvider" if self._execution.device == "cuda" else "CPUExecutionProvider"
        return runtime.InferenceSession(proto.SerializeToString(), options, providers=[provider])


def onnx_runtime() -> Any:
    """The module. Raises MissingExtraError where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("ONNX Runtime is not installed; run: pip install 'dotresize-fx[cpu]'") from error
    return onnxruntime


def _reads(node: ir.Node) -> frozenset[str]:
    """What a node reads of its graph, its bodies included."""
    found = [value for value in node.inputs if value is not None]
    for body in bodies(node):
        inner = [value for user in body.all_nodes() for value in user.inputs if value is not None]
        found += [value for value in (*inner, *body.outputs) if value.graph is node.graph]
    return frozenset(str(value.name) for value in found if value.name)


def _failed(error: Exception) -> Exception:
    said = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_ROOM):
        return OutOfMemoryError(f"no memory left to run the model: {said}; give shorter inputs")
    return OnnxRuntimeError(f"ONNX Runtime cannot run the model: {said}")


class OnnxStream:
    """The activations of all batches at one position of a graph, brought on piece by piece.

    ``held`` are values that are never dropped. ``masks``: per batch, see :func:`dotresize_fx.gram.padding_mask`.
    """

    def __init__(
        self,
        execution: OnnxExecution,
        environments: Sequence[Environment],
        masks: Sequence[torch.Tensor | None],
        held: Iterable[str] = (),
    ) -> None:
        self.execution, self.environments, self.masks = execution, list(environments), masks
        self.held = frozenset(held)
        self.position = 0

    def advance(self, stop: int, keep: Sequence[str] = ()) -> list[Environment]:
        """Run to ``stop``; the values of ``keep`` by batch."""
        execution = self.execution
        held = [name for name in self.held if execution.position(name) < stop]
        live = dict.fromkeys([*execution.needed_behind(stop), *held])
        piece = execution.piece(self.position, stop, [*live, *keep])
        kept: list[Environment] = []
        for i, environment in enumerate(self.environments):
            values, _ = piece.run(environment)
            self.environments[i] = {name: values[name] for name in live}
            kept.append({name: values[name] for name in keep})
        self.position = stop
        return kept

    def sums(
        self,
        stop: int,
        nodes: GramNodes,
        outputs: Sequence[str] = (),
        overrides: Mapping[str, torch.Tensor] | None = None,
        extra: Sequence[Mapping[str, RuntimeValue]] | None = None,
    ) -> Iterable[tuple[Environment, Sums]]:
        """Per batch what :meth:`Piece.run` gives of the nodes from here to ``stop``; the stream stays where it is."""
        piece = self.execution.piece(self.position, stop, outputs, nodes, overrides)
        for i, environment in enumerate(self.environments):
            yield piece.run(environment, self.masks[i], None if extra is None else extra[i])
