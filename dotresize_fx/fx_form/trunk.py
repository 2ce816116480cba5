"""The part of a program before its head as generated code: differentiable, and without a Python loop over nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.export.graph_signature import InputKind

from dotresize_fx.errors import UsageError
from dotresize_fx.fx_form.cache import at_start
from dotresize_fx.fx_form.edits import is_impure
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.fx_form.half_products import PRODUCTS, PRODUCTS_OF_WEIGHTS, clamped, exact, without_parameters
from dotresize_fx.fx_form.repeats import repeated

aten = torch.ops.aten


class Head(NamedTuple):
    """Keys of the last linear's weight (vocabulary, width) and bias (vocabulary,)."""

    weight: str
    bias: str | None


class Trunk:
    """Computes the head's input, or the first output where the last op is no plain linear, and chosen streams.

    Parameters and buffers are given by key when it is called, so that any tensors may stand in for the program's.
    The program itself is not touched, and its later edits are not seen.

    Attributes:
        head: the linear that was cut off, if there is one and it was asked for.
        keys: what the calls need, of the state dict and the constants; parameters in ``parameters``.
        products: with ``bfloat16``, the parameters that autocast rounds wherever they are read (the head's are not
            among them): given in bfloat16 they give the same.
        dimensions: the number of dimensions of the program's first output.

    Raises:
        UsageError: a stream's name is not in the graph.
    """

    def __init__(
        self, graph: FxGraph, streams: Sequence[str] = (), *, cut_head: bool = True, bfloat16: bool = False
    ) -> None:
        """``bfloat16``: it will run under autocast. What no parameter enters, position tables, stays as exact as it
        is then, and masks of float32's lowest number become bfloat16's, which rounding does not make infinite.
        """
        copied = torch.fx.Graph()
        made: dict[torch.fx.Node, torch.fx.Node] = {}
        copied.graph_copy(graph.nodes, made)
        specs = {spec.arg.name: spec for spec in graph.program.graph_signature.input_specs}
        last = graph.nodes.output_node().all_input_nodes[0]
        self.dimensions = last.meta["val"].ndim
        self.head = _head(last, {name: str(spec.target) for name, spec in specs.items()}) if cut_head else None
        end: Any = last.args[0] if self.head else last
        try:
            wanted = [made[end], *(made[graph.node(name)] for name in streams)]
        except KeyError as error:
            raise UsageError(f"no value {error} in the graph, whose error was to be part of the loss") from error
        for joined in (made[graph.node(name)] for name in graph.caches):  # the past is empty
            parts: Any = joined.args[0]
            joined.replace_all_uses_with(parts[1])
        copied.output(tuple(wanted))
        copied.eliminate_dead_code(is_impure)
        old_names = {new: old.name for old, new in made.items()}
        self._inputs: list[tuple[bool, str]] = []
        self._given: dict[str, torch.fx.Node] = {}
        self.parameters = {str(specs[n].target) for n in specs if specs[n].kind is InputKind.PARAMETER}
        for node in [node for node in copied.nodes if node.op == "placeholder"]:
            spec = specs[old_names[node]]
            if not node.users:
                copied.erase_node(node)
            elif spec.kind is InputKind.USER_INPUT:
                self._inputs.append((True, old_names[node]))
                self._given[old_names[node]] = node
            else:
                self._inputs.append((False, str(spec.target)))
        self.keys = dict.fromkeys(key for given, key in self._inputs if not given)
        self.keys |= dict.fromkeys(key for key in self.head or () if key)
        self.parameters &= self.keys.keys()
        placeholders = [node for node in copied.nodes if node.op == "placeholder"]
        learned = [node for node, (_, key) in zip(placeholders, self._inputs, strict=True) if key in self.parameters]
        fixed = without_parameters(copied.nodes, learned)
        _merge_repeated(copied, fixed)
        self.products: set[str] = set()
        if bfloat16:
            _guard_against_autocast(copied, fixed)
            for node, (_, key) in zip(placeholders, self._inputs, strict=True):
                if key in self.parameters and all(user.target in PRODUCTS_OF_WEIGHTS for user in node.users):
                    self.products.add(key)
            self.products -= {key for key in self.head or () if key}
        self._forward = torch.fx.GraphModule(graph.program.graph_module, copied).forward

    def __call__(
        self, values: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(the head's input or the first output, the streams), each (batch, length, width).

        A cache is empty, and positions that are not given are counted from 0.
        """
        own = {key: inputs[key] if key in inputs else at_start(node, inputs) for key, node in self._given.items()}
        found, *streams = self._forward(*[own[key] if given else values[key] for given, key in self._inputs])
        return found, streams


def _head(last: torch.fx.Node, keys: Mapping[str, str]) -> Head | None:
    if last.target is not aten.linear.default:
        return None
    source, weight, bias = (*last.args, None)[:3]
    if not isinstance(source, torch.fx.Node) or not isinstance(weight, torch.fx.Node) or weight.name not in keys:
        return None
    if not isinstance(bias, torch.fx.Node):
        return Head(keys[weight.name], None)
    return Head(keys[weight.name], keys[bias.name]) if bias.name in keys else None


def _merge_repeated(graph: torch.fx.Graph, nodes: list[torch.fx.Node]) -> None:
    """Every block of an exported model makes its own copy of the attention mask: one is enough."""
    same = repeated(nodes)
    for node, one in same.items():
        node.replace_all_uses_with(one)
    for node in reversed(same):
        graph.erase_node(node)
        nodes.remove(node)


def _guard_against_autocast(graph: torch.fx.Graph, fixed: list[torch.fx.Node]) -> None:
    for node in graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = clamped(node.args), clamped(node.kwargs)
    for node in fixed:
        if node.target in PRODUCTS:
            node.target = exact(node.target)
