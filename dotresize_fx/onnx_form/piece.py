"""Some nodes of an ONNX graph as a session of their own: weights are fed to it, and what it sums leaves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
import torch
from onnx import helper

from dotresize_fx.errors import MissingExtraError, OnnxRuntimeError, OutOfMemoryError
from dotresize_fx.onnx_form.form import bodies
from dotresize_fx.onnx_form.gram_nodes import ROW_MASK, GramNodes, Sums
from dotresize_fx.onnx_form.runtime_values import RuntimeValue, constant_to_runtime, to_runtime

if TYPE_CHECKING:
    from dotresize_fx.onnx_form.execution import OnnxExecution

# Value name -> the runtime's own value.
Environment = dict[str, RuntimeValue]
_NO_ROOM = ("Failed to allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")


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
        available: frozenset[str] | None = None,
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
            elif execution.is_static(name) or self._is_gone(name, available):
                first.append(execution.producer(name))
                waiting += sorted(reads_of(first[-1]))
            else:
                self._read.append(name)
        self._nodes = sorted({*first, *chosen}, key=execution.order.__getitem__)
        self._made = {str(output.name) for node in self._nodes for output in node.outputs if output.name}
        self._session: Any = None

    def takes(self, overrides: Mapping[str, torch.Tensor]) -> bool:
        """Whether a run may be given these weights in place of the graph's: all are fed, and of the same shape."""
        return all(
            name in self._weights and list(self._weights[name].shape()) == list(tensor.shape)
            for name, tensor in overrides.items()
        )

    def _is_gone(self, name: str, available: frozenset[str] | None) -> bool:
        """Whether an earlier node gave it, and nothing kept it: an edit let later nodes read it."""
        return available is not None and name not in available and self._execution.position(name) >= 0

    def _add_constant(self, name: str) -> None:
        tensor = self._execution.constants[name]
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
        overrides: Mapping[str, RuntimeValue] | None = None,
    ) -> tuple[Environment, Sums]:
        """(the outputs, what was summed). ``mask`` (batch, length) is not 0 at rows that count; None: all do.

        ``extra`` are values that the sums read beside the graph's own, ``overrides`` stand in for weights of which
        it :meth:`takes` others.
        """
        given = {**environment, **(extra or {})}
        fed = {name: given[name] for name in self._read} | self._weights | dict(overrides or {})
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
            except (MissingExtraError, NoDeviceError):
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

    def _sizes(self, name: str, met: list[int]) -> list[int | None]:
        """What is declared of an input: of a weight all, of a value its width, where that is stated. Some of ONNX
        Runtime's own ops ask for these.
        """
        if name in self._weights or not met:
            return list(met)
        stated = self._execution.width(name)
        return [*[None] * (len(met) - 1), None if stated is None else met[-1]]

    def _open(self, fed: Environment, names: Sequence[str]) -> Any:
        runtime = onnx_runtime()
        model = self._execution.model
        inputs = [
            helper.make_tensor_value_info(name, value.element_type(), self._sizes(name, list(value.shape())))
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
        options.log_severity_level = 4  # what fails is raised: whether a length is taken is tried out
        # A session runs a few batches: looking for fusions takes longer than they save.
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        return start_session(runtime, proto.SerializeToString(), options, self._execution.device)


class NoDeviceError(OnnxRuntimeError):
    """ONNX Runtime could not start on the device."""


def start_session(runtime: Any, model: bytes, options: Any, device: str) -> Any:
    """A session on ``device``. Sums and proofs are of float32, so CUDA must not round what it multiplies (TF32).

    Raises:
        NoDeviceError: the device's provider does not start, for which ONNX Runtime would take the CPU and say nothing.
    """
    if device == "cpu":
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    if hasattr(runtime, "preload_dlls"):
        runtime.preload_dlls()  # CUDA's libraries out of Python packages, where the system has none
    # Each session has a store of its own, which would double with every block that it lacks.
    how = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
    session = runtime.InferenceSession(model, options, providers=[("CUDAExecutionProvider", how)])
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise NoDeviceError(
            "ONNX Runtime could not start CUDAExecutionProvider: check the driver, or take --device cpu"
        )
    return session


def onnx_runtime() -> Any:
    """The module. Raises MissingExtraError where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("ONNX Runtime is not installed; run: pip install 'dotresize-fx[cpu]'") from error
    return onnxruntime


def reads_of(node: ir.Node) -> frozenset[str]:
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
