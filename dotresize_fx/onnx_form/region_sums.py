"""What is summed of a region while an ONNX graph runs, and what its writers are once a map is folded into them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dotresize_fx.gram import GramAccumulator
from dotresize_fx.graph import Op
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.gram_nodes import GramNodes, Sums
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.region_map import RegionMap
from dotresize_fx.region_ops import RegionOps
from dotresize_fx.regions import Region, Symmetry

READ, ENTERED = "read", "entered"
# What the sums name beside what the reader reads.
WANTED, OWN = "wanted", "own"
Parts = tuple[tuple[str, float], ...]
# Tensors that stand in for constants, by name and as these are stored.
Overrides = dict[str, torch.Tensor]


class OnnxRegion(RegionOps):
    """``hidden`` and ``output`` are what the reader reads and puts out, ``entry`` what the writers do; value names."""

    graph: OnnxGraph

    def __init__(self, graph: OnnxGraph, region: Region) -> None:
        super().__init__(graph, region)
        self.entry = None if self.reader is not None else self.writers[0].inputs[0].name
        self.hidden = None if self.reader is None else self.reader.inputs[0].name
        self.output = None if self.reader is None else self.reader.name

        self.tables: tuple[str, ...] = ()
        if region.symmetry is Symmetry.ROTARY_PAIRS and region.layout is not None:
            self.tables = tuple(name for name, _ in region.layout.tables[:2])

    def start(self, execution: OnnxExecution) -> int:
        """Where the region begins: all is there that its writers read, and none of them was run."""
        read = [value.name for op in self.writers for value in op.inputs if not value.is_parameter]
        return 1 + min(execution.position(name) for name in read)

    def end(self, execution: OnnxExecution) -> int:
        """Behind what is summed."""
        return 1 + max(execution.position(name) for name in (self.hidden, self.output, self.entry) if name)

    def nodes(self, others: Mapping[str, Parts]) -> GramNodes:
        """For what the reader reads, with ``others`` beside it; for queries and keys what their writers read."""
        nodes = GramNodes()
        if self.hidden is not None:
            nodes.add(READ, self.hidden, others, ones=self.biased)
        if self.entry is not None:
            nodes.add(ENTERED, self.entry, {}, ones=True)
        return nodes

    def mapped_writers(self, found: RegionMap) -> Overrides:
        """The writers' weights and biases with a map folded into them, by constant and as stored."""
        overrides: Overrides = {}
        for op in self.writers:
            overrides |= self.mapped(op, found.down_of(self.region, op.name))
        return overrides

    def mapped(self, op: Op, down: torch.Tensor) -> Overrides:
        """One writer's, with ``down``, (all that it writes, k), folded into it."""
        weight, bias = self.graph.weight(op), self.graph.bias(op)
        assert op.weight is not None
        mapped = (down.T @ weight.double()).to(weight.dtype)
        found = {op.weight.name: self.graph.as_stored(op, mapped)}
        if bias is not None and op.bias is not None:
            found[op.bias.name] = (down.T @ bias.double()).to(bias.dtype)
        return found

    def changed_reader(self, change: torch.Tensor) -> Overrides:
        """The reader with ``change``, (n, out), added to its weight."""
        assert self.reader is not None
        assert self.reader.weight is not None
        weight = self.graph.weight(self.reader)
        changed = (weight.double() + change.T).to(weight.dtype)
        return {self.reader.weight.name: self.graph.as_stored(self.reader, changed)}


def add_to(sums: GramAccumulator, found: Sums, key: str) -> None:
    """What a batch gave under ``key``, if anything."""
    if f"{key}/gram" not in found:
        return
    named = [name.removeprefix(f"{key}/cross/") for name in found if name.startswith(f"{key}/cross/")]
    sums.add_sums(
        int(found[f"{key}/tokens"]),
        torch.from_numpy(found[f"{key}/gram"]),
        {name: torch.from_numpy(found[f"{key}/cross/{name}"]) for name in named},
        {name: torch.from_numpy(found[f"{key}/energy/{name}"]) for name in named},
    )
