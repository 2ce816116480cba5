"""Merge a block into the one behind it: theta = alpha theta_l + (1 - alpha) theta_m, and one block less."""

from __future__ import annotations

import torch

from dotresize_fx.graph import Graph, Op, Value
from dotresize_fx.passes.drop_layers import DropLayers
from dotresize_fx.passes.find_blocks import Block
from dotresize_fx.passes.pass_base import Pass, PassResult, promise


class MergeLayers(Pass):
    """The weights of ``first`` go into those of ``second``, whose ops stay, and ``first`` leaves the graph.

    MKA (arXiv 2406.16330, section on merging), ``alpha`` the weight of ``first``. The ops of ``second`` keep their
    names, so the stream behind the merged block is called what the dense model's is behind both.
    """

    def __init__(self, first: Block, second: Block, alpha: float) -> None:
        self.first, self.second, self.alpha = first, second, alpha

    def requires(self, graph: Graph) -> None:
        promise(
            self.first.form == self.second.form, f"{self.second.end.name}: a block of another form than the one before"
        )
        promise(self.first.end == self.second.start, f"{self.second.end.name}: its block does not follow the other")
        promise(0 <= self.alpha <= 1, f"a weight of {self.alpha}")
        DropLayers([self.first]).requires(graph)

    def call(self, graph: Graph) -> PassResult:
        for one, other in zip(self.first.ops, self.second.ops, strict=True):
            self._merge(graph, graph.op(one), graph.op(other))
        records = DropLayers([self.first]).call(graph).records
        return PassResult((f"{self.second.end.name}: {self.alpha:.3f} of the block before it merged in", *records))

    def _merge(self, graph: Graph, one: Op, other: Op) -> None:
        if other.weight is not None:
            mean = self._mean(graph.weight(one), graph.weight(other))
            if mean is not None:
                graph.set_weight(other, mean)
        bias, own = graph.bias(one), graph.bias(other)
        if bias is not None and own is not None and (mean := self._mean(bias, own)) is not None:
            graph.set_bias(graph.op(other.name), mean)
        for value, mine in zip(one.inputs, other.inputs, strict=True):  # a layer scale, an expert's bias
            if _is_learned(graph, mine) and value != mine:
                mean = self._mean(graph.parameter(value), graph.parameter(mine))
                if mean is not None:
                    graph.set_parameter(mine, mean)

    def _mean(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor | None:
        """None where the two are the same: constants that a layer has a copy of stay as they are."""
        if torch.equal(one, other):
            return None
        mean = self.alpha * one.double() + (1 - self.alpha) * other.double()
        return mean.to(other.dtype)

    def ensures(self, graph: Graph) -> None:
        DropLayers([self.first]).ensures(graph)


def _is_learned(graph: Graph, value: Value) -> bool:
    return value.is_parameter and not graph.is_buffer(value)
