"""Reading a :class:`torch.export.ExportedProgram` as a neutral graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from dotresize_fx.cache_names import PAST
from dotresize_fx.fx_form.kinds import classify, is_turned_weight
from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.offload.lazy_tensor import LazyTensor
from dotresize_fx.offload.stored_tensors import Spool

# Bytes; what is smaller would fill no page of a file.
LEAST_SPOOLED = 1 << 16


class FxReading(Graph):
    """What of the torch.fx form only reads; ``program`` is the exported program, its parameters placeholders."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        # Where what is computed waits, if not in memory.
        self.spool: Spool | None = None
        # Products of whole activations are taken in bfloat16, as autocast does.
        self.half_products = False
        # See CausalMasks; copies share them.
        self.causal_masks: dict[tuple[Any, ...], torch.Tensor] = {}
        self._shapes_stale = False
        self._nodes_by_name: dict[str, torch.fx.Node] = {}

    # -- reading -----------------------------------------------------------------------------------

    @property
    def nodes(self) -> torch.fx.Graph:
        """The torch.fx graph itself."""
        graph: torch.fx.Graph = self.program.graph_module.graph
        return graph

    def node(self, name: str) -> torch.fx.Node:
        """The torch.fx node behind an op or value name."""
        if not self._nodes_by_name:
            self._nodes_by_name = {node.name: node for node in self.nodes.nodes}
        return self._nodes_by_name[name]

    def changed(self) -> None:
        super().changed()
        self._nodes_by_name = {}

    def value(self, node: torch.fx.Node) -> Value:
        """What the view has for a node."""
        val = node.meta.get("val")
        shape: tuple[int | str, ...] = ()
        if isinstance(val, torch.Tensor):
            shape = tuple(plain_size(size) for size in val.shape)
        return Value(node.name, shape, node.name in self._parameter_targets)

    @property
    def _parameter_targets(self) -> dict[str, str]:
        """Placeholder name -> key in the state dict or the constants."""
        if "_targets" not in self.__dict__:
            self.__dict__["_targets"] = {
                spec.arg.name: str(spec.target)
                for spec in self.program.graph_signature.input_specs
                if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
            }
        targets: dict[str, str] = self.__dict__["_targets"]
        return targets

    def is_buffer(self, value: Value) -> bool:
        return any(
            spec.arg.name == value.name and spec.kind is not InputKind.PARAMETER
            for spec in self.program.graph_signature.input_specs
        )

    def parameter_name(self, value: Value) -> str:
        return self._parameter_targets[value.name]

    # One node is read without reading the whole graph, so that a long row of edits stays cheap.

    def op(self, name: str) -> Op:
        return self._read_op(self.node(name))

    def producer(self, value: Value) -> Op | None:
        node = self.node(value.name)
        return self._read_op(node) if node.op == "call_function" else None

    def users(self, value: Value) -> list[Op]:
        users = [user for user in self.node(value.name).users if user.op == "call_function"]
        if value.is_parameter:
            users = [reader for user in users for reader in (list(user.users) if self._is_turned(user) else [user])]
        return [self._read_op(user) for user in sorted(users)]

    def _read_ops(self) -> list[Op]:
        nodes = (node for node in self.nodes.nodes if node.op == "call_function")
        return [self._read_op(node) for node in nodes if not self._is_turned(node)]

    def _is_turned(self, node: torch.fx.Node) -> bool:
        """Whether a node only turns experts' weights round; such are no ops of the view."""
        return node.target is torch.ops.aten.transpose.int and is_turned_weight(node, self._parameter_targets)

    def stored_expert_weight(self, op: Op, weight: torch.Tensor) -> tuple[torch.fx.Node, torch.Tensor]:
        """The placeholder of an EXPERTS op's weight, and ``weight`` (experts, out, in) as it would be stored there."""
        assert op.weight is not None
        return self.node(op.weight.name), self.oriented(op, weight).to(self.parameter(op.weight).dtype)

    def stored_weight(self, op: Op) -> torch.fx.Node:
        """The placeholder of an EXPERTS op's weight, or the node that turns it round."""
        weight: torch.fx.Node = self.node(op.name).args[1]  # type: ignore[assignment]
        return weight

    def oriented(self, op: Op, weight: torch.Tensor) -> torch.Tensor:
        """An op's weight as it is stored from the view's orientation, and the other way round.

        Only experts may be stored turned round, (experts, in, out): where no op of the program turns them.
        """
        return weight.mT if op.kind is Kind.EXPERTS and self.stored_weight(op).op == "placeholder" else weight

    def _read_outputs(self) -> frozenset[Value]:
        return frozenset(self.value(node) for node in self.nodes.output_node().all_input_nodes)

    def _read_op(self, node: torch.fx.Node) -> Op:
        inputs = tuple(self.value(n) for n in node.all_input_nodes)
        output = self.value(node)
        kind, attributes = classify(node, self._parameter_targets)
        weight = bias = None
        if kind is Kind.LINEAR:
            inputs = (self.value(node.args[0]),)  # type: ignore[arg-type]
            weight, bias = self._owned(node, 1, "weight"), self._owned(node, 2, "bias")
        elif kind is Kind.EXPERTS:
            rows, stored, *ends = node.all_input_nodes
            inputs = (self.value(rows), *(self.value(end) for end in ends))
            weight = self.value(stored if stored.op == "placeholder" else stored.args[0])  # type: ignore[arg-type]
            attributes = attributes | {"rows_per_token": _hint(rows.meta["val"].shape[:-1]) / self._traced_tokens}
        elif kind is Kind.EMBEDDING:
            places: Any = node.args[1]  # of an index a list of one
            inputs = (self.value(places[0] if isinstance(places, (list, tuple)) else places),)
            weight = self._owned(node, 0, "weight")
        elif kind in (Kind.RMS_NORM, Kind.LAYER_NORM):
            inputs = (self.value(node.args[0]),)  # type: ignore[arg-type]
            weight = self._owned(node, 2, "weight")
            bias = self._owned(node, 3, "bias") if kind is Kind.LAYER_NORM else None
        elif attributes.get("cast") or attributes.get("view_as"):
            inputs = inputs[:1]  # another tells the dtype or the shape
        elif kind is Kind.ATTENTION or attributes.get("form") in ("concat", "where"):
            inputs = tuple(self.value(n) for n in _in_order(node))
        spelling = str(getattr(node.target, "__name__", node.target))
        return Op(node.name, kind, inputs, output, weight, bias, attributes, spelling)

    @cached_property
    def _traced_tokens(self) -> int:
        """Of the sample that the program was traced with."""
        inputs = {s.arg.name for s in self.program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT}
        if any(name.startswith(PAST) for name in inputs):  # the mask is as long as the past too
            inputs = {"input_ids"}
        shapes = [node.meta["val"].shape for node in self.nodes.nodes if node.name in inputs]
        return max((_hint(shape[:2]) for shape in shapes if len(shape) > 1), default=1)

    def expected_rows(self, inputs: Mapping[str, torch.Tensor]) -> int:
        """About how many rows a linear of the blocks is given when these inputs are run: as many for their size as when
        it was traced.
        """
        linears = [op for op in self.ops if op.kind is Kind.LINEAR]
        traced = [_hint(self.node(op.name).meta["val"].shape[:-1]) for op in linears]
        name, value = next(iter(inputs.items()))
        share = value.numel() / max(1, _hint(self.node(name).meta["val"].shape))
        return max(1, round(max(traced, default=1) * share))

    @property
    def attended_length(self) -> int:
        """The most keys that a query attended to when it was traced; 1 without attention."""
        keys = [self.node(op.inputs[1].name).meta["val"] for op in self.ops if op.kind is Kind.ATTENTION]
        return max((_hint(value.shape[-2:-1]) for value in keys), default=1)

    def _owned(self, node: torch.fx.Node, position: int, keyword: str) -> Value | None:
        argument = node.args[position] if len(node.args) > position else node.kwargs.get(keyword)
        return self.value(argument) if isinstance(argument, torch.fx.Node) else None

    def parameter(self, value: Value) -> torch.Tensor:
        return self.stored(self._parameter_targets[value.name]).detach()

    def stored(self, key: str) -> torch.Tensor:
        """The tensor under a key of the state dict or of the constants, as it is now."""
        found = self.program.state_dict.get(key)
        tensor: torch.Tensor = self.program.constants[key] if found is None else found
        return tensor

    def kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, which takes no memory until it is needed again where the graph has a spool."""
        return tensor if self.spool is None else self.spool.put_probe(tensor)

    def kept_activation(self, value: Any) -> Any:
        """A tensor of numbers where the spool has streams wait; anything else as it is."""
        if self.spool is None or not isinstance(value, torch.Tensor) or isinstance(value, LazyTensor):
            return value
        worth = value.is_floating_point() and value.nbytes >= LEAST_SPOOLED
        return self.spool.put_activation(value) if worth else value

    def _read_weight(self, op: Op) -> torch.Tensor:
        assert op.weight is not None
        return self.oriented(op, self.parameter(op.weight))


def plain_size(size: Any) -> int | str:
    """A number, or the name of a size that is free; a symbol that turned out to be a number is one."""
    return size if isinstance(size, int) else _plain(size.node.expr)


@lru_cache(1024)
def _plain(expression: Any) -> int | str:
    """The same of what sympy knows, which takes its time to say it."""
    return int(name) if (name := str(expression)).isdigit() else name


def _hint(sizes: Iterable[Any]) -> int:
    """The product of sizes, those that are free as they were traced."""
    return math.prod(size if isinstance(size, int) else int(size.node.hint) for size in sizes)


def _in_order(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes among its arguments, in their order, one that stands twice given twice."""
    found: list[torch.fx.Node] = []
    torch.fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n))
    return found
