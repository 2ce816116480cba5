"""Put a region's map into the graph as explicit linears: n -> k behind the writers, k -> n before the readers."""

from __future__ import annotations

import math

import torch

from dotresize_fx.graph import Graph, Kind, Op
from dotresize_fx.head_maps import over_heads
from dotresize_fx.passes.pass_base import Pass, PassResult, promise
from dotresize_fx.passes.region_ends import tables_of
from dotresize_fx.passes.resize_heads import check_heads, resize_heads
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region, Symmetry


class InsertMaps(Pass):
    """Afterwards all between the region's writers and readers is k wide. ``downs`` and ``ups`` name the new linears.

    A norm of k instead of n dimensions divides by the root mean square of k: with epsilon n/k larger, its output is
    sqrt(n/k) times too small, which the readers behind it make good.
    """

    def __init__(self, region: Region, region_map: RegionMap) -> None:
        self.region = region
        self.map = region_map
        self.downs: list[str] = []
        self.ups: list[str] = []

    def requires(self, graph: Graph) -> None:
        n = self.region.width
        start = self.map.down.shape[-2] if self.map.down.ndim < 4 else self.map.down.shape[1]
        promise(start == n, f"{self.region.name}: the map starts at {start}, not {n}")
        if self.region.layout is not None:
            check_heads(graph, self.region, self.map)
        if self.region.symmetry is Symmetry.PERMUTATION:
            promise(not self.region.norms or self.map.width == n, f"{self.region.name}: its norms keep their width")
            return
        for name in self.region.norms:
            norm = graph.op(name)
            promise(norm.weight is None, f"{name}: a map that is not diagonal cannot cross a gain")
            promise(norm.kind is Kind.RMS_NORM, f"{name}: centre the layer norm first")

    def call(self, graph: Graph) -> PassResult:
        region, k = self.region, self.map.width
        # Asked for first: behind a map of another width a reshape does not look like one that keeps its width.
        places = dict(region.places)
        crossed = [graph.op(name) for name in region.crossed]
        reshapes = [op.name for op in crossed if op.attributes.get("reshape") and op.output.name not in places]
        for name in region.writers:
            writer, down = graph.op(name), self.map.down_of(region, name)
            if writer.kind is Kind.EMBEDDING and down.ndim > 2:  # each expert's bias, by its own map
                mixed = torch.einsum("en,enk->ek", graph.weight(writer).double(), down)
                graph.set_weight(writer, mixed.to(_dtype(graph, writer)))
                continue
            down = over_heads(region, down, _size(graph, writer, -2 if writer.is_linear else 1))
            weight = down.mT.to(_dtype(graph, writer))
            self.downs.append(graph.insert_linear(writer.output, weight, name="inserted_down", like=writer).name)
        for table in tables_of(graph, region):
            numbers, place = graph.parameter(table), places.get(table.name, -1)
            mapped = (numbers.double().movedim(place, -1) @ self.map.down).movedim(-1, place)
            graph.set_parameter(table, mapped.to(numbers.dtype))
        for name in region.norms if region.symmetry is not Symmetry.PERMUTATION else ():
            norm = graph.op(name)
            graph.resize_norm(norm, k, norm.attributes["epsilon"] * region.width / k)
        if region.layout is not None:
            resize_heads(graph, region, self.map)
        else:
            for name in reshapes:
                graph.resize_reshape(graph.op(name), k)
            for op in crossed:
                _resize_between(graph, op, places.get(op.output.name), k)
        for name in region.readers:
            self._before_reader(graph, graph.op(name))
        return PassResult((f"{region.name}: {region.width} -> {k}",))

    def _before_reader(self, graph: Graph, reader: Op) -> None:
        if reader.name in self.map.reader_weights:
            dtype = _dtype(graph, reader)
            graph.set_weight(reader, self.map.reader_weights[reader.name].to(dtype))
            if reader.name in self.map.reader_biases:
                graph.set_bias(graph.op(reader.name), self.map.reader_biases[reader.name].to(dtype))
            return
        promise(self.map.up is not None, f"{self.region.name}: no way up to {reader.name}")
        assert self.map.up is not None
        gain = math.sqrt(self.region.width / self.map.width) if reader.name in self.region.normed_readers else 1.0
        up = over_heads(self.region, self.map.up, _size(graph, reader, -1))
        weight = (gain * up.mT).to(_dtype(graph, reader))
        inserted = graph.insert_linear(reader.inputs[0], weight, users=[reader], name="inserted_up", like=reader)
        self.ups.append(inserted.name)


def _resize_between(graph: Graph, op: Op, place: int | None, width: int) -> None:
    """What an op between states of the width where it is not the last axis."""
    if op.kind is Kind.CHANNELWISE:
        graph.resize_channels(op, width)
    elif place is not None and op.attributes.get("form") == "view":
        graph.resize_axes(op, {len(op.output.shape) + place: width})


def _size(graph: Graph, op: Op, axis: int) -> int:
    return int(graph.weight(op).shape[axis])


def _dtype(graph: Graph, op: Op) -> torch.dtype:
    return graph.weight(op).dtype
