"""The torch.fx form of the neutral view: a :class:`torch.export.ExportedProgram` read and edited as a Graph."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from dotresize_fx.fx_form.kinds import classify
from dotresize_fx.graph import Graph, Kind, Op, Value

aten = torch.ops.aten


class FxGraph(Graph):
    """An exported program whose parameters are placeholders, as ``torch.export`` makes it.

    Edits write to the program in place: nodes, the graph signature and the state dict.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
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

    def _value(self, node: torch.fx.Node) -> Value:
        val = node.meta.get("val")
        shape: tuple[int | str, ...] = ()
        if isinstance(val, torch.Tensor):
            shape = tuple(size if isinstance(size, int) else str(size) for size in val.shape)
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
        return [self._read_op(user) for user in sorted(self.node(value.name).users) if user.op == "call_function"]

    def _read_ops(self) -> list[Op]:
        return [self._read_op(node) for node in self.nodes.nodes if node.op == "call_function"]

    def _read_outputs(self) -> frozenset[Value]:
        return frozenset(self._value(node) for node in self.nodes.output_node().all_input_nodes)

    def _read_op(self, node: torch.fx.Node) -> Op:
        inputs = tuple(self._value(n) for n in node.all_input_nodes)
        output = self._value(node)
        kind, attributes = classify(node, self._parameter_targets)
        weight = bias = None
        if kind is Kind.LINEAR:
            inputs = (self._value(node.args[0]),)  # type: ignore[arg-type]
            weight, bias = self._owned(node, 1, "weight"), self._owned(node, 2, "bias")
        elif kind is Kind.EMBEDDING:
            inputs = (self._value(node.args[1]),)  # type: ignore[arg-type]
            weight = self._owned(node, 0, "weight")
        elif kind in (Kind.RMS_NORM, Kind.LAYER_NORM):
            inputs = (self._value(node.args[0]),)  # type: ignore[arg-type]
            weight = self._owned(node, 2, "weight")
            bias = self._owned(node, 3, "bias") if kind is Kind.LAYER_NORM else None
        spelling = str(getattr(node.target, "__name__", node.target))
        return Op(node.name, kind, inputs, output, weight, bias, attributes, spelling)

    def _owned(self, node: torch.fx.Node, position: int, keyword: str) -> Value | None:
        argument = node.args[position] if len(node.args) > position else node.kwargs.get(keyword)
        return self._value(argument) if isinstance(argument, torch.fx.Node) else None

    def parameter(self, value: Value) -> torch.Tensor:
        return self.stored(self._parameter_targets[value.name]).detach()

    def stored(self, key: str) -> torch.Tensor:
        """The tensor under a key of the state dict or of the constants, as it is now."""
        found = self.program.state_dict.get(key)
        tensor: torch.Tensor = self.program.constants[key] if found is None else found
        return tensor

    def _read_weight(self, op: Op) -> torch.Tensor:
        assert op.weight is not None
        return self.parameter(op.weight)

    # -- editing -----------------------------------------------------------------------------------

    def set_weight(self, ops: Op | Sequence[Op], tensor: torch.Tensor) -> None:
        chosen = [ops] if isinstance(ops, Op) else list(ops)
        value = chosen[0].weight
        assert value is not None
        self._set_parameter(chosen, value, tensor)

    def set_bias(self, op: Op, tensor: torch.Tensor | None) -> None:
        if tensor is not None and op.bias is not None:
            self._set_parameter([op], op.bias, tensor)
            return
        node = self.node(op.name)
        position = 2 if op.kind is Kind.LINEAR else 3
        stem = self.parameter_name(op.weight).rsplit(".", 1)[0] if op.weight else op.name
        new = None if tensor is None else self.add_parameter(f"{stem}.bias", tensor)
        node.args = (*(*node.args, None)[:position], new, *node.args[position + 1 :])
        self.changed()

    def _set_parameter(self, ops: list[Op], value: Value, tensor: torch.Tensor) -> None:
        """Store ``tensor`` for ``value``; users other than ``ops`` keep the old tensor."""
        others = [op for op in self.users(value) if op not in ops]
        same = [op for op in ops if value in (op.weight, op.bias)]
        if others or len(same) != len(ops):
            new = self.add_parameter(self.parameter_name(value), tensor)
            for op in ops:
                mine = op.bias if value == op.bias else op.weight
                assert mine is not None
                self.node(op.name).replace_input_with(self.node(mine.name), new)
        else:
            self._store(value, tensor)
        self._shapes_stale = True
        self.changed()

    def _store(self, value: Value, tensor: torch.Tensor) -> None:
        key, node = self._parameter_targets[value.name], self.node(value.name)
        store = self.program.state_dict if key in self.program.state_dict else self.program.constants
        store[key] = _as_parameter(tensor)
        node.meta["val"] = _fake_like(node, tuple(tensor.shape))

    def add_parameter(self, name: str, tensor: torch.Tensor) -> torch.fx.Node:
        """A new placeholder and state-dict entry; ``name`` is made unique."""
        taken, key = self.program.state_dict, name
        counter = 1
        while key in taken or key in self.program.constants:
            key, counter = f"{name}_{counter}", counter + 1
        specs = self.program.graph_signature.input_specs
        first = next(node for node in self.nodes.nodes if node.op == "placeholder")
        with self.nodes.inserting_before(first):
            node = self.nodes.placeholder("p_" + key.replace(".", "_"))
        node.meta["val"] = _fake_like(first, tuple(tensor.shape), tensor.dtype)
        specs.insert(0, InputSpec(InputKind.PARAMETER, TensorArgument(node.name), key))
        self.program.state_dict[key] = _as_parameter(tensor)
        self.changed()
        self.__dict__.pop("_targets", None)
        return node

    def resize_norm(self, op: Op, width: int, epsilon: float) -> None:
        node = self.node(op.name)
        affine = (None,) if op.kind is Kind.RMS_NORM else (None, None)
        node.args = (node.args[0], [width], *affine, epsilon)
        self._shapes_stale = True
        self.changed()

    def resize_reshape(self, op: Op, width: int) -> None:
        node = self.node(op.name)
        shape: Any = node.args[1]
        *leading, last = shape
        node.args = (node.args[0], [*leading, last if last == -1 else width])
        self._shapes_stale = True
        self.changed()

    def drop_affine(self, op: Op) -> None:
        width = op.output.width
        assert width is not None
        self.resize_norm(op, width, op.attributes["epsilon"])

    def insert_linear(
        self,
        source: Value,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        users: Iterable[Op] | None = None,
        name: str = "inserted",
    ) -> Op:
        node = self.node(source.name)
        readers = [self.node(op.name) for op in users] if users is not None else list(node.users)
        parameters = [self.add_parameter(f"{name}.weight", weight)]
        if bias is not None:
            parameters.append(self.add_parameter(f"{name}.bias", bias))
        with self.nodes.inserting_after(node):
            new = self.nodes.create_node("call_function", aten.linear.default, (node, *parameters), name=name)
        new.meta["val"] = node.meta["val"].new_empty((*node.meta["val"].shape[:-1], weight.shape[0]))
        for reader in readers:
            reader.replace_input_with(node, new)
        self._shapes_stale = True
        self.changed()
        return self.op(new.name)

    def replace_with_rms_norm(self, last: Op, source: Value, gain: Value | None, epsilon: float) -> None:
        node, start = self.node(last.name), self.node(source.name)
        width = source.width
        weight = None if gain is None else self.node(gain.name)
        with self.nodes.inserting_before(node):
            new = self.nodes.call_function(aten.rms_norm.default, (start, [width], weight, epsilon))
        self._replace(node, new)

    def replace_with_linear(self, last: Op, source: Value, like: Op) -> None:
        node, start = self.node(last.name), self.node(source.name)
        arguments: Any = self.node(like.name).args
        bias, _, weight = arguments
        value = self._value(weight)
        transposed = self.parameter(value).t()
        if len(weight.users) == 1 and len(self.node(like.name).users) == 1:
            # Only the product that goes reads it: the transposed weight keeps the model's name for it.
            stored = weight
            self._store(value, transposed)
        else:
            stored = self.add_parameter(self.parameter_name(value), transposed)
        with self.nodes.inserting_before(node):
            new = self.nodes.call_function(aten.linear.default, (start, stored, bias))
        self._replace(node, new)

    def make_rms_norm(self, op: Op) -> None:
        node = self.node(op.name)
        with self.nodes.inserting_before(node):
            args = (node.args[0], node.args[1], None, op.attributes["epsilon"])
            new = self.nodes.call_function(aten.rms_norm.default, args)
        self._replace(node, new)

    def _replace(self, node: torch.fx.Node, new: torch.fx.Node) -> None:
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
        self.nodes.erase_node(node)
        self._rename_output(node.name, new.name)
        self.changed()

    def bypass(self, op: Op) -> None:
        node = self.node(op.name)
        source = node.all_input_nodes[0]
        node.replace_all_uses_with(source)
        self.nodes.erase_node(node)
        self._rename_output(node.name, source.name)
        self.changed()

    def _rename_output(self, old: str, new: str) -> None:
        for spec in self.program.graph_signature.output_specs:
            if spec.arg.name == old:
                spec.arg.name = new

    def remove_dead(self) -> int:
        before = len(self.nodes.nodes)
        kept = {node.name for node in self.nodes.nodes if node.op == "placeholder"}
        self.nodes.eliminate_dead_code(is_impure)
        removed = before - len(self.nodes.nodes)
        specs = self.program.graph_signature.input_specs
        unused = {name for name in kept & set(self._parameter_targets) if not self.node(name).users}
        for spec in [s for s in specs if s.arg.name in unused]:
            specs.remove(spec)
            key = str(spec.target)
            if not any(str(s.target) == key for s in specs):
                self.program.state_dict.pop(key, None)
                self.program.constants.pop(key, None)
        for name in unused:
            self.nodes.erase_node(self.node(name))
        self.changed()
        self.__dict__.pop("_targets", None)
        return removed

    def refresh_shapes(self) -> None:
        """Compute every node's shape anew, symbols included, after edits that changed widths."""
        if not self._shapes_stale:
            return
        from torch._dispatch.python import enable_python_dispatcher
        from torch.fx.passes.fake_tensor_prop import FakeTensorProp

        placeholders = [n.meta["val"] for n in self.nodes.nodes if n.op == "placeholder"]
        mode = next(v.fake_mode for v in placeholders if isinstance(v, torch._subclasses.FakeTensor))
        self.program.graph_module.recompile()
        # Without the dispatcher, older releases ask composite ops for sizes that are only symbols.
        with enable_python_dispatcher():
            FakeTensorProp(self.program.graph_module, mode).propagate_dont_convert_inputs(*placeholders)
        self._shapes_stale = False
        self.changed()

    def to(self, device: str) -> None:
        """Move parameters, constants and the devices that tracing baked in, in place."""
        from torch.export.passes import move_to_device_pass

        # The pass moves the tensors of this program's own state dict: a copy that shares them keeps its own.
        self.program = move_to_device_pass(self.program, device)
        self.changed()

    def copy(self) -> FxGraph:
        program = self.program
        graph = torch.fx.Graph()
        ends: Any = graph.graph_copy(program.graph_module.graph, {}, return_output_node=True)
        result, old = ends
        graph.output(result).meta.update(old.meta)
        copied = FxGraph(
            ExportedProgram(
                root=program.graph_module,
                graph=graph,
                graph_signature=copy.deepcopy(program.graph_signature),
                state_dict=dict(program.state_dict),
                range_constraints=dict(program.range_constraints),
                module_call_graph=program.module_call_graph,
                example_inputs=program.example_inputs,
                constants=dict(program.constants),
                verifiers=program.verifiers,
            )
        )
        copied._shapes_stale = self._shapes_stale
        return copied


def is_impure(node: torch.fx.Node) -> bool:
    """Asserts that tracing left in and shape queries count as removable; what is returned stays."""
    if node.op in ("placeholder", "output"):
        return True
    return node.op == "call_function" and node.target not in (operator.getitem,) and _has_effects(node.target)


def _has_effects(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


def _as_parameter(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return torch.nn.Parameter(tensor.detach().contiguous(), requires_grad=False)


def _fake_like(node: torch.fx.Node, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
    """A fake tensor of this shape in the fake mode of ``node``."""
    val = node.meta["val"]
    with val.fake_mode:
        return torch.empty(shape, dtype=dtype or val.dtype, device=val.device)
