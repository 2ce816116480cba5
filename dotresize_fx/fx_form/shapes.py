"""Shapes of what an exported program computes: told anew after edits, and told of another device.

Blocks that are alike ask for the same shapes, and torch takes milliseconds over each with sizes that are symbols: each
question is asked once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from dotresize_fx.fx_form.edits import has_effects

# What to expect of a tensor, by what it is: see _told.
Known = dict[object, Any]


def refresh_shapes(program: ExportedProgram) -> None:
    """Compute every node's shape from those of the program's inputs, symbols included."""
    from torch._dispatch.python import enable_python_dispatcher

    placeholders = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"]
    mode = next(v.fake_mode for v in placeholders if isinstance(v, torch._subclasses.FakeTensor))
    program.graph_module.recompile()
    # Without the dispatcher, older releases ask composite ops for sizes that are only symbols.
    with enable_python_dispatcher():
        told = (_AskedOnce if _may_share(program.graph) else FakeTensorProp)(program.graph_module, mode)
        told.propagate_dont_convert_inputs(*placeholders)


def moved(program: ExportedProgram, device: str) -> ExportedProgram:
    """The program, in place, with parameters, constants and the devices that tracing baked in on ``device``.

    The tensors moved are those of this program's own state dict: a copy that shares them keeps its own.
    """
    from torch.export.passes import move_to_device_pass

    shapes = {node: node.meta.pop("val", None) for node in program.graph.nodes}
    program = move_to_device_pass(program, device)
    known: Known = {}

    def there(shape: torch.Tensor) -> torch.Tensor:
        key = _told(shape)
        if key not in known:
            known[key] = shape.to(device)
        found: torch.Tensor = known[key]
        return found

    for node, shape in shapes.items():
        node.meta["val"] = pytree.tree_map_only(torch.Tensor, there, shape)
    return program


def _may_share(graph: torch.fx.Graph) -> bool:
    """Whether calls that are alike may give one tensor: of sizes that only numbers tell torch takes note at the tensor,
    and what is written into may change its shape.
    """
    calls = [node for node in graph.nodes if node.op == "call_function"]
    return not any("unbacked_bindings" in node.meta or has_effects(node.target) for node in calls)


class _AskedOnce(FakeTensorProp):
    """As torch's, with one answer for calls of the same op on the same shapes."""

    def __init__(self, module: torch.fx.GraphModule, mode: Any) -> None:
        super().__init__(module, mode)
        self._known: Known = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        given, form = pytree.tree_flatten(self.fetch_args_kwargs_from_env(n))
        key = (n.target, form, tuple(map(_told, given)))
        if key in self._known:
            result, told = self._known[key]
            if told is not None:  # as it is of what gives nothing
                n.meta["val"] = told
            return result
        result = super().run_node(n)
        # Where numbers are known, shapes may follow from them.
        if not any(getattr(value, "constant", None) is not None for value in given):
            self._known[key] = result, None if result is None else n.meta["val"]
        return result


def _told(value: object) -> object:
    """What shapes follow from; equal where they are."""
    if isinstance(value, torch.Tensor):
        sizes = (*value.size(), *value.stride(), value.storage_offset())
        return (*map(_told, sizes), value.dtype, value.device, value.requires_grad)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return type(value), value.node.expr
    return type(value), value
