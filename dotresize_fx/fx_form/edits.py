"""Edits of an exported program: nodes, the graph signature and the state dict, in place."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from dotresize_fx.fx_form.axes import axes_form
from dotresize_fx.fx_form.channelwise import resize_channels
from dotresize_fx.fx_form.kinds import matrix_of
from dotresize_fx.fx_form.reading import FxReading
from dotresize_fx.graph import Kind, Op, Value

aten = torch.ops.aten
_OPEN = 2**63 - 1  # how torch spells a slice's open end


class FxEdits(FxReading):
    """The edits of the neutral view, on torch.fx."""

    def set_weight(self, ops: Op | Sequence[Op], tensor: torch.Tensor) -> None:
        chosen = [ops] if isinstance(ops, Op) else list(ops)
        value = chosen[0].weight
        assert value is not None
        self._set_parameter(chosen, value, self.oriented(chosen[0], tensor))

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

    def set_parameter(self, value: Value, tensor: torch.Tensor) -> None:
        self._store(value, tensor)
        self._shapes_stale = True
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

    def add_parameter(self, name: str, tensor: torch.Tensor, *, buffer: bool = False) -> torch.fx.Node:
        """A new placeholder and state-dict entry, a buffer if told or if it holds integers; ``name`` is made unique."""
        taken, key = self.program.state_dict, name
        counter = 1
        while key in taken or key in self.program.constants:
            key, counter = f"{name}_{counter}", counter + 1
        specs = self.program.graph_signature.input_specs
        first = next(node for node in self.nodes.nodes if node.op == "placeholder")
        with self.nodes.inserting_before(first):
            node = self.nodes.placeholder("p_" + key.replace(".", "_"))
        node.meta["val"] = _fake_like(first, tuple(tensor.shape), tensor.dtype)
        if tensor.is_floating_point() and not buffer:
            spec = InputSpec(InputKind.PARAMETER, TensorArgument(node.name), key)
        else:
            spec = InputSpec(InputKind.BUFFER, TensorArgument(node.name), key, persistent=True)
        specs.insert(0, spec)
        self.program.state_dict[key] = tensor.detach().contiguous() if buffer else _as_parameter(tensor)
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

    def resize_axes(self, op: Op, sizes: Mapping[int, int]) -> None:
        node = self.node(op.name)
        stated: Any = node.args[1]
        new = [sizes.get(i, s) if isinstance(s, int) and s != -1 else s for i, s in enumerate(stated)]
        node.args = (node.args[0], new, *node.args[2:])
        self._shapes_stale = True
        self.changed()

    def resize_slice(self, op: Op, start: int, stop: int | None) -> None:
        node = self.node(op.name)
        node.args = (*node.args[:2], start, _OPEN if stop is None else stop)
        self._shapes_stale = True
        self.changed()

    def resize_channels(self, op: Op, width: int) -> None:
        resize_channels(self.node(op.name), width)
        self._shapes_stale = True
        self.changed()

    def input_sizes(self, name: str) -> tuple[int | str, ...]:
        return self.value(self.node(name)).shape

    def resize_input(self, name: str, sizes: Mapping[int, int]) -> None:
        node = self.node(name)
        value = node.meta["val"]
        node.meta["val"] = value.new_empty([sizes.get(axis, size) for axis, size in enumerate(value.shape)])
        self._shapes_stale = True
        self.changed()

    def insert_gather(self, source: Value, indices: torch.Tensor, *, users: Iterable[Op], name: str = "gathered") -> Op:
        node = self.node(source.name)
        readers = [self.node(op.name) for op in users]
        weights = next(iter(self.program.state_dict.values()), indices)  # the device of all of them
        places = self.add_parameter(f"{name}.indices", indices.to(weights.device, torch.int64))
        first = next(other for other in self.nodes.nodes if other in readers)
        with self.nodes.inserting_before(first):  # beside its use: the source may be a table at the graph's start
            new = self.nodes.create_node("call_function", aten.index_select.default, (node, -1, places), name=name)
        new.meta["val"] = node.meta["val"].new_empty((*node.meta["val"].shape[:-1], len(indices)))
        for reader in readers:
            reader.replace_input_with(node, new)
        self._shapes_stale = True
        self.changed()
        return self.op(new.name)

    def set_attention_scale(self, op: Op, scale: float) -> None:
        node = self.node(op.name)
        node.kwargs = {**node.kwargs, "scale": scale}
        self.changed()

    def redirect(self, op: Op, value: Value) -> None:
        node, new = self.node(op.name), self.node(value.name)
        node.replace_all_uses_with(new)
        self._rename_output(node.name, new.name)
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
        like: Op | None = None,
    ) -> Op:
        node = self.node(source.name)
        readers = [self.node(op.name) for op in users] if users is not None else list(node.users)
        if like is not None and weight.ndim > 2:
            return self._insert_experts(node, weight, readers, name, self.node(like.name))
        parameters = [self.add_parameter(f"{name}.weight", weight)]
        if bias is not None:
            parameters.append(self.add_parameter(f"{name}.bias", bias))
        with self.nodes.inserting_after(node):
            new = self.nodes.create_node("call_function", aten.linear.default, (node, *parameters), name=name)
        new.meta["val"] = node.meta["val"].new_empty((*node.meta["val"].shape[:-1], weight.shape[0]))
        for reader in readers:
            reader.replace_input_with(node, new)
            if reader.op == "output":
                self._rename_output(node.name, new.name)
        self._shapes_stale = True
        self.changed()
        return self.op(new.name)

    def _insert_experts(
        self,
        node: torch.fx.Node,
        weight: torch.Tensor,
        readers: list[torch.fx.Node],
        name: str,
        like: torch.fx.Node,
    ) -> Op:
        """The rows that ``like`` reads may be there before it is known where each expert's end: it stands beside."""
        parameter = self.add_parameter(f"{name}.weight", weight)
        behind = self.nodes.inserting_after(like) if node is like else self.nodes.inserting_before(like)
        with behind:
            turned = self.nodes.call_function(aten.transpose.int, (parameter, -2, -1))
        turned.meta["val"] = parameter.meta["val"].mT
        with self.nodes.inserting_after(turned):
            arguments = (node, turned, *like.args[2:])
            new = self.nodes.create_node("call_function", like.target, arguments, like.kwargs, name=name)
        new.meta["val"] = node.meta["val"].new_empty((*node.meta["val"].shape[:-1], weight.shape[1]))
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
        self.replace(node, new)

    def replace_with_layer_norm(self, last: Op, source: Value, gain: Value | None, epsilon: float) -> bool:
        node, start = self.node(last.name), self.node(source.name)
        weight = None if gain is None else self.node(gain.name)
        with self.nodes.inserting_before(node):
            new = self.nodes.call_function(aten.layer_norm.default, (start, [source.width], weight, None, epsilon))
        self.replace(node, new)
        return True

    def replace_with_linear(self, last: Op, source: Value, like: Op) -> None:
        node, start = self.node(last.name), self.node(source.name)
        arguments: Any = self.node(like.name).args
        bias, _, weight = arguments if len(arguments) == 3 else (None, *arguments)
        given = matrix_of(weight, self._parameter_targets)
        assert given is not None
        value = self.value(given)
        transposed = self.parameter(value).t()
        if given is not weight:
            stored = given  # (out, in) already
        elif len(weight.users) == 1 and len(self.node(like.name).users) == 1:
            # Only the product that goes reads it: the transposed weight keeps the model's name for it.
            stored = weight
            self._store(value, transposed)
        else:
            stored = self.add_parameter(self.parameter_name(value), transposed)
        with self.nodes.inserting_before(node):
            new = self.nodes.call_function(aten.linear.default, (start, stored, bias))
        self.replace(node, new)

    states_views = True

    def insert_like(self, op: Op, source: Value, last: tuple[int, ...] = (), replaced: int = 0) -> Value:
        node, start = self.node(op.name), self.node(source.name)
        rest: Any = node.args[1:]
        if replaced:
            rest = ([*rest[0][:-replaced], *last],)
            shape = [*node.meta["val"].shape[:-replaced], *last]
        elif (form := axes_form(node))["form"] == "unsqueeze":
            before = start.meta["val"].shape
            shape = [*before[: form["axis"]], 1, *before[form["axis"] :]]
        else:
            shape = [start.meta["val"].shape[axis] for axis in form["order"]]
        with self.nodes.inserting_before(node):
            new = self.nodes.create_node("call_function", node.target, (start, *rest))
        new.meta["val"] = start.meta["val"].new_empty(shape)
        # What was a view of the old memory may be none of the new.
        for view in self.nodes.find_nodes(op="call_function", target=aten.view.default):
            view.target = aten.reshape.default
        self._shapes_stale = True
        self.changed()
        return self.value(new)

    def reread(self, op: Op, value: Value) -> None:
        node = self.node(op.name)
        node.args = (self.node(value.name), *node.args[1:])
        self.changed()

    def make_rms_norm(self, op: Op) -> None:
        node = self.node(op.name)
        with self.nodes.inserting_before(node):
            args = (node.args[0], node.args[1], None, op.attributes["epsilon"])
            new = self.nodes.call_function(aten.rms_norm.default, args)
        self.replace(node, new)

    def replace(self, node: torch.fx.Node, new: torch.fx.Node) -> None:
        """Let ``new`` stand where ``node`` did."""
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

    def remove_ops(self, names: Sequence[str]) -> None:
        for node in [self.node(name) for name in reversed(names)]:
            if not node.users:
                self.nodes.erase_node(node)
        self.changed()

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


def is_impure(node: torch.fx.Node) -> bool:
    """Asserts that tracing left in and shape queries count as removable; what is returned stays."""
    if node.op in ("placeholder", "output"):
        return True
    return node.op == "call_function" and node.target not in (operator.getitem,) and has_effects(node.target)


def has_effects(target: Any) -> bool:
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
