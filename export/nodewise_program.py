"""Decompose an exported program op by op, where torch retraces all of it; a retrace with free sizes takes minutes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from dotresize_fx.fx_form.edits import has_effects

aten = torch.ops.aten
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
Table = Mapping[Any, Callable[..., Any]]
# Composite ops that torch always decomposes, though converters know them as they are.
_KNOWN = {aten.reshape.default}


class NodewiseProgram(ExportedProgram):
    """An exported program, decomposed by the table it is given like any, only faster.

    A program with an op that cannot be taken by itself (it writes in place, takes computed sizes, puts out several
    tensors) is decomposed as torch does it.
    """

    @classmethod
    def of(cls, program: ExportedProgram) -> NodewiseProgram:
        """The same program, its nodes and tensors copied and shared."""
        made = cls(
            root=program.graph_module,
            graph=program.graph,
            graph_signature=program.graph_signature,
            state_dict=program.state_dict,
            range_constraints=program.range_constraints,
            module_call_graph=program.module_call_graph,
            example_inputs=program.example_inputs,
            constants=program.constants,
            verifiers=program.verifiers,
        )
        made._guards_code = list(program._guards_code)  # which is not told by the graph where inputs are gone
        return made

    def run_decompositions(self, decomp_table: Table | None = None, *args: Any, **kwargs: Any) -> ExportedProgram:
        if decomp_table is None or args or kwargs or not self._decompose(decomp_table):
            decomposed: ExportedProgram = super().run_decompositions(decomp_table, *args, **kwargs)
            return decomposed
        return self

    def _decompose(self, table: Table) -> bool:
        """Whether every op that has to be could be decomposed by itself; the graph is changed only then."""
        whole = torch.export.default_decompositions()  # of composite ops torch keeps what is here and not in the table
        parts: dict[Any, torch.fx.Graph] = {}
        keys: dict[torch.fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node.op in ("placeholder", "output") or _computes_sizes(node):
                continue
            if not isinstance(node.target, torch._ops.OpOverload) or has_effects(node.target):
                return False
            if "val" not in node.meta:  # an exporter put it there, and trusts that all is traced again
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)
            composite = node.target.has_kernel_for_dispatch_key(COMPOSITE)
            kept = not composite or node.target in whole or node.target in _KNOWN
            if node.target not in table and kept and node.target != aten.rms_norm.default:
                continue
            values = [source.meta.get("val") for source in node.all_input_nodes]
            if not all(isinstance(value, torch.Tensor) for value in (*values, node.meta.get("val"))):
                return False
            key = keys[node] = _key(node, values)
            if key not in parts:
                try:
                    parts[key] = _part(node, values, table)
                except Exception:  # torch, with all of the program before it, may know better
                    return False
                if any(inner.op == "get_attr" or has_effects(inner.target) for inner in parts[key].nodes):
                    return False
        for node, key in keys.items():
            name = _put(self.graph, node, parts[key]).name
            for spec in self.graph_signature.output_specs:
                if spec.arg.name == node.name:
                    spec.arg.name = name
        self.graph.eliminate_dead_code()
        self.graph_module.recompile()
        return True


def _computes_sizes(node: torch.fx.Node) -> bool:
    """Whether a node is Python's own arithmetic."""
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and getattr(operator, name, None) is node.target


def _key(node: torch.fx.Node, values: list[torch.Tensor]) -> Any:
    """The same for nodes that are decomposed alike: the op and all it reads, but for the numbers in tensors."""
    places = {source: f"input {index}" for index, source in enumerate(node.all_input_nodes)}
    arguments = repr(torch.fx.node.map_arg((node.args, node.kwargs), places.__getitem__))
    like = [(str(value.dtype), str(value.device), str(value.shape), str(value.stride())) for value in values]
    return node.target, arguments, tuple(like)


def _part(node: torch.fx.Node, values: list[torch.Tensor], table: Table) -> torch.fx.Graph:
    """What one op is decomposed into, its placeholders the op's inputs in their order."""
    sources = node.all_input_nodes

    def run(*given: torch.Tensor) -> Any:
        tensors = dict(zip(sources, given, strict=True))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), tensors.__getitem__)
        run_op: Any = _rms_norm if node.target == aten.rms_norm.default else node.target
        return run_op(*args, **kwargs)

    written = make_fx(run, decomposition_table=dict(table))(*values)
    if not any(has_effects(inner.target) for inner in written.graph.nodes):
        return written.graph
    return make_fx(torch.func.functionalize(written), decomposition_table=dict(table))(*values).graph


def _rms_norm(
    x: torch.Tensor, shape: list[int], weight: torch.Tensor | None = None, epsilon: float | None = None
) -> torch.Tensor:
    """As models spell it, which fusions look for; torch's own counts the axes from the front."""
    if x.dtype != torch.float32 or epsilon is None or len(shape) != 1:
        return aten.rms_norm.default(x, shape, weight, epsilon)  # type: ignore[no-any-return]
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    return normed if weight is None else normed * weight


def _put(graph: torch.fx.Graph, node: torch.fx.Node, part: torch.fx.Graph) -> torch.fx.Node:
    """The nodes of ``part`` in place of ``node``; returns what stands for it now."""
    given = dict(zip(part.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    with graph.inserting_before(node):
        result = graph.graph_copy(part, given)
    assert isinstance(result, torch.fx.Node)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return result
