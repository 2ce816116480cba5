"""Run an exported program in pieces, so that one block's activations are in flight and not the whole model's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch

from dotresize_fx.fx_form.cache import at_start
from dotresize_fx.fx_form.causal_masks import CausalMasks
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.fx_form.half_products import PRODUCTS, clamped, exact
from dotresize_fx.fx_form.stored_parameters import StoredParameters
from dotresize_fx.offload.lazy_tensor import LazyTensor, in_memory

Environment = dict[torch.fx.Node, Any]
# So many nodes are computed again rather than that what they give waits.
NEAR = 8


class Execution(StoredParameters):
    """Runs a graph's nodes in order over environments that hold what later nodes still need.

    The graph must not gain or lose nodes between construction and use; weights may change. What a program with a
    cache hands on of it counts as a result with ``caches`` only: it would be held for every batch. Where the graph has
    ``half_products`` these are bfloat16's, but for position tables.
    """

    def __init__(self, graph: FxGraph, *, caches: bool = False) -> None:
        super().__init__(graph)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        results = graph.nodes.output_node().all_input_nodes
        self.results = [node for node in results if caches or node.name not in graph.caches]
        self._last_use = self._find_last_uses()
        self._crossing: list[int] = []
        self._causal = CausalMasks(list(graph.nodes.nodes), self.learned, graph.causal_masks)
        self._targets: dict[torch.fx.Node, Any] = {}
        if graph.half_products:
            self._targets = {node: exact(node.target) for node in self._causal.fixed if node.target in PRODUCTS}

    def _find_last_uses(self) -> dict[torch.fx.Node, int]:
        last: dict[torch.fx.Node, int] = {}
        for i, node in enumerate(self.nodes):
            for used in node.all_input_nodes:
                last[used] = i
        return last | dict.fromkeys(self.results, len(self.nodes))

    def hold(self, nodes: Iterable[torch.fx.Node]) -> None:
        """Never drop these values from an environment."""
        self._last_use |= dict.fromkeys(nodes, len(self.nodes))
        self._crossing = []

    def position(self, node: torch.fx.Node) -> int:
        """Which of the nodes it is; -1 for an input or a parameter, which is there from the start."""
        return self.index.get(node, -1)

    def pieces(self, start: int, stop: int, limit: int | None = None) -> list[int]:
        """Where batches that are run from ``start`` to ``stop`` had better wait for one another, and ``stop``: weights
        that stay in files are read once for all of them where ``limit`` bytes can be held, which by default is what the
        spool can while it holds what the next piece needs. Of places behind half of that, one that few values cross.
        """
        if limit is None:
            limit = self.graph.spool.weights.limit // 2 if self.graph.spool is not None else 0
        if not limit:
            return [stop]
        found: list[int] = []
        place, half, size, seen = start, start + 1, 0, set[torch.fx.Node]()
        while place < stop:
            read = {node for node in self.nodes[place].all_input_nodes if node in self._place} - seen
            more = self.bytes_of_files(read)
            if size and size + more > limit:
                found.append(place := self._narrowest_of(range(half, place + 1)))
                half, size, seen = place + 1, 0, set()
                continue
            size, place = size + more, place + 1
            seen |= read
            if 2 * size <= limit:
                half = place
        return [*found, stop]

    def read_between(self, start: int, stop: int) -> set[torch.fx.Node]:
        """What nodes ``start`` to ``stop`` (exclusive) read of an environment, and may not find in it."""
        return {used for node in self.nodes[start:stop] for used in node.all_input_nodes}

    def narrowest(self, start: int, stop: int) -> int:
        """The last place from ``start`` to ``stop``, or near to that, which the fewest values cross: in front of a norm
        and not behind it, where what it reads has to wait too.
        """
        return self._narrowest_of(range(max(start, stop - NEAR), stop + 1))

    def _narrowest_of(self, places: range) -> int:
        if not self._crossing:
            change = [0] * (len(self.nodes) + 2)
            for node, last in self._last_use.items():
                if node in self.index:
                    change[self.index[node] + 1] += 1
                    change[last + 1] -= 1
            self._crossing = list(accumulate(change))
        return min(reversed(places), key=lambda place: self._crossing[place])

    def put_away(self, environment: Environment, kept: Mapping[int, torch.Tensor] | None = None) -> None:
        """Have activations wait where the spool says. ``kept``, by identity, wait elsewhere already."""
        known = kept or {}
        for node, value in environment.items():
            if not self._causal.knows(value):
                environment[node] = known[id(value)] if id(value) in known else self.graph.kept_activation(value)

    def start(self, inputs: Mapping[str, torch.Tensor]) -> Environment:
        """An environment with the program's inputs, by the names the program gives them.

        A cache that is not given is empty, and positions are counted from 0.
        """
        return {n: inputs[n.name] if n.name in inputs else at_start(n, inputs) for n in self.inputs}

    def begins_as(self, other: Execution, stop: int) -> bool:
        """Whether the first ``stop`` nodes are the other's too, over the same numbers, and what is needed of them from
        there on is needed by the other too.
        """
        if [_written(node) for node in self.nodes[:stop]] != [_written(node) for node in other.nodes[:stop]]:
            return False
        theirs, between = {node.name: node for node in other.parameters}, self.read_between(0, stop)
        read = [node for node in self.parameters if node in between]
        if any(self.stored(node) is not other.stored(theirs[node.name]) for node in read):
            return False
        pairs = zip(self.nodes[:stop], other.nodes[:stop], strict=True)
        return all(self._last_use.get(own, -1) < stop or other._last_use.get(node, -1) >= stop for own, node in pairs)

    def goes_on(self, environment: Environment, other: Execution, values: Environment, stop: int) -> Environment:
        """The environment, with what the other computed of its own first ``stop`` nodes, which are these."""
        computed = {self.nodes[i]: value for node, value in values.items() if 0 <= (i := other.position(node)) < stop}
        return {n: value for n, value in (environment | computed).items() if not self._is_over(n, computed, stop)}

    def read_for_good(
        self, start: int, stop: int, without: Iterable[torch.fx.Node]
    ) -> dict[torch.fx.Node, torch.Tensor]:
        """What nodes ``start`` to ``stop`` (exclusive) read of parameters that stay in files, for many runs, but for
        some; a table of which only rows are read is none.
        """
        read = [node for node in self.read_between(start, stop) - {*without} if node in self._place]
        return {node: in_memory(self.parameter(node)) for node in read if self._in_file(node) is not None}

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
            return in_memory(given[node]) if node in given else self.parameter(node, ahead=not given)

        half, targets = self.graph.half_products, self._targets
        with torch.set_grad_enabled(gradients), self._rounding(environment):
            for i in range(start, stop):
                node = self.nodes[i]
                args, kwargs = node.args, node.kwargs
                if half:
                    args, kwargs = clamped(args), clamped(kwargs)
                value = self._causal.found(node, environment)
                if value is None:
                    args, kwargs = torch.fx.node.map_arg(args, look_up), torch.fx.node.map_arg(kwargs, look_up)
                    if node.name in self.graph.caches and not args[0][0].shape[2]:
                        value = args[0][1]  # behind an empty past, whose heads may have been cut meanwhile
                    else:
                        args, kwargs = self._causal.without(node, args, kwargs)
                        value = self._causal.shared(node, targets.get(node, node.target)(*args, **kwargs))
                environment[node] = value
                if node in wanted:
                    kept[node] = value
                for used in node.all_input_nodes:
                    if self._is_over(used, environment, i + 1):
                        environment.pop(used, None)
                        fetched.pop(used, None)
        for node in [n for n in environment if self._is_over(n, environment, stop)]:
            del environment[node]
        return kept

    def _is_over(self, node: torch.fx.Node, environment: Environment, stop: int) -> bool:
        """Whether no node from ``stop`` on needs this one's value; a shared mask is for all that make it again."""
        if self._last_use.get(node, -1) >= stop:
            return False
        return not self._causal.knows(environment.get(node)) or self.position(self._causal.last.get(node, node)) < stop

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


def _written(node: torch.fx.Node) -> tuple[Any, ...]:
    return node.name, node.target, str(node.args), str(node.kwargs)
