"""Run an exported program in pieces, so that one block's activations are in flight and not the whole model's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.export.graph_signature import InputKind

from dotresize_fx.fx_form.cache import at_start
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.fx_form.half_products import PRODUCTS, clamped, exact, without_parameters
from dotresize_fx.lazy_tensor import PIECE, LazyTensor, in_memory

Environment = dict[torch.fx.Node, Any]


class Execution:
    """Runs a graph's nodes in order over environments that hold what later nodes still need.

    The graph must not gain or lose nodes between construction and use; weights may change. What a program with a
    cache hands on of it counts as a result with ``caches`` only: it would be held for every batch. Where the graph has
    ``half_products`` these are bfloat16's, but for position tables.
    """

    def __init__(self, graph: FxGraph, *, caches: bool = False) -> None:
        self.graph = graph
        self.program = graph.program
        specs = self.program.graph_signature.input_specs
        placeholders = [node for node in graph.nodes.nodes if node.op == "placeholder"]
        self.inputs = [n for n, s in zip(placeholders, specs, strict=True) if s.kind is InputKind.USER_INPUT]
        self.parameters = [n for n, s in zip(placeholders, specs, strict=True) if s.kind is not InputKind.USER_INPUT]
        self._keys = {n: str(s.target) for n, s in zip(placeholders, specs, strict=True)}
        self.nodes = [node for node in graph.nodes.nodes if node.op == "call_function"]
        self.index = {node: i for i, node in enumerate(self.nodes)}
        results = graph.nodes.output_node().all_input_nodes
        self.results = [node for node in results if caches or node.name not in graph.caches]
        self._tables = {node.args[0] for node in self.nodes if node.target is torch.ops.aten.embedding.default}
        self._last_use = self._find_last_uses()
        self._targets: dict[torch.fx.Node, Any] = {}
        if graph.half_products:
            learned = [n for n, s in zip(placeholders, specs, strict=True) if s.kind is InputKind.PARAMETER]
            fixed = without_parameters(graph.nodes.nodes, learned)
            self._targets = {node: exact(node.target) for node in fixed if node.target in PRODUCTS}

    def _find_last_uses(self) -> dict[torch.fx.Node, int]:
        last: dict[torch.fx.Node, int] = {}
        for i, node in enumerate(self.nodes):
            for used in node.all_input_nodes:
                last[used] = i
        return last | dict.fromkeys(self.results, len(self.nodes))

    def hold(self, nodes: Iterable[torch.fx.Node]) -> None:
        """Never drop these values from an environment."""
        self._last_use |= dict.fromkeys(nodes, len(self.nodes))

    def position(self, node: torch.fx.Node) -> int:
        """Which of the nodes it is; -1 for an input or a parameter, which is there from the start."""
        return self.index.get(node, -1)

    def pieces(self, start: int, stop: int) -> list[int]:
        """Where batches that are run from ``start`` to ``stop`` had better wait for one another, and ``stop``: weights
        that stay in files are read once for all of them where the spool can hold what a piece needs.
        """
        limit = self.graph.spool.recent.limit if self.graph.spool is not None else 0
        if not limit:
            return [stop]
        parameters, seen = set(self.parameters), set[torch.fx.Node]()
        found, size = [], 0
        for i in range(start, stop):
            read = [node for node in self.nodes[i].all_input_nodes if node in parameters]
            if size and size + self._bytes_of_files(node for node in read if node not in seen) > limit:
                found.append(i)
                size, seen = 0, set()
            size += self._bytes_of_files(node for node in read if node not in seen)
            seen.update(read)
        return [*found, stop]

    def _bytes_of_files(self, nodes: Iterable[torch.fx.Node]) -> int:
        tensors = (self.graph.stored(self._keys[node]) for node in nodes)
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, LazyTensor))

    def start(self, inputs: Mapping[str, torch.Tensor]) -> Environment:
        """An environment with the program's inputs, by the names the program gives them.

        A cache that is not given is empty, and positions are counted from 0.
        """
        return {n: inputs[n.name] if n.name in inputs else at_start(n, inputs) for n in self.inputs}

    def parameter(self, node: torch.fx.Node) -> torch.Tensor:
        """The tensor behind a parameter placeholder, as it is now; one in a file is read, if not parts of it do."""
        stored = self.graph.stored(self._keys[node])
        if not isinstance(stored, LazyTensor) or stored.nbytes > PIECE or node in self._tables:
            return stored
        return stored.read() if self.graph.spool is None else self.graph.spool.recent.read(stored)

    def run(
        self,
        environment: Environment,
        start: int,
        stop: int,
        keep: Iterable[torch.fx.Node] = (),
        parameters: Mapping[torch.fx.Node, torch.Tensor] | None = None,
        *,
        gradients: bool = False,
    ) -> dict[torch.fx.Node, Any]:
        """Run nodes ``start`` to ``stop`` (exclusive) in place; returns the values of ``keep``.

        Values that no node from ``stop`` on needs are dropped from the environment as soon as they were used.
        ``parameters`` stand in for the program's own where given. ``gradients`` lets autograd follow.
        """
        wanted = set(keep)
        kept = {node: environment[node] for node in wanted & environment.keys()}
        given = parameters or {}
        fetched: Environment = {}  # what waits elsewhere, read once

        def look_up(node: torch.fx.Node) -> Any:
            if node.op != "placeholder" or node in environment:
                if node in fetched:
                    return fetched[node]
                value = environment[node]
                if isinstance(value, LazyTensor):
                    value = fetched[node] = value.read()
                return value
            return in_memory(given[node]) if node in given else self.parameter(node)

        half, targets = self.graph.half_products, self._targets
        with torch.set_grad_enabled(gradients), self._rounding(environment):
            for i in range(start, stop):
                node = self.nodes[i]
                args, kwargs = node.args, node.kwargs
                if half:
                    args, kwargs = clamped(args), clamped(kwargs)
                args, kwargs = torch.fx.node.map_arg(args, look_up), torch.fx.node.map_arg(kwargs, look_up)
                if node.name in self.graph.caches and not args[0][0].shape[2]:
                    value = args[0][1]  # behind an empty past, whose heads may have been cut meanwhile
                else:
                    value = targets.get(node, node.target)(*args, **kwargs)
                environment[node] = value
                if node in wanted:
                    kept[node] = value
                for used in node.all_input_nodes:
                    if self._last_use[used] <= i:
                        environment.pop(used, None)
                        fetched.pop(used, None)
        for node in [n for n in environment if self._last_use.get(n, -1) < stop]:
            del environment[node]
        return kept

    def _rounding(self, environment: Environment) -> AbstractContextManager[Any]:
        if not self.graph.half_products:
            return nullcontext()
        where = next((value.device.type for value in environment.values() if isinstance(value, torch.Tensor)), "cpu")
        return torch.autocast(where, torch.bfloat16)

    def outputs(self, inputs: Mapping[str, torch.Tensor]) -> Sequence[torch.Tensor]:
        """Run everything; returns the program's outputs in their order."""
        environment = self.start(inputs)
        values = self.run(environment, 0, len(self.nodes), keep=self.results)
        # A result may be a constant that nothing computes.
        return [values[node] if node in values else self.parameter(node) for node in self.results]
