"""Take the parts of a sum as sums of parts: gate and up by turns, of experts that have biases of their own."""

from __future__ import annotations

from dotresize_fx.graph import Graph
from dotresize_fx.passes.pass_base import Pass, PassResult


class DistributeSlices(Pass):
    """``(linear(x, W) + table[i])[..., rows]`` becomes ``linear(x, W)[..., rows] + table[:, rows][i]``.

    Where nothing but such slices, or a split, reads the sum, and a linear is one of its terms. What is left can be
    split with its linear.
    """

    def call(self, graph: Graph) -> PassResult:
        records = graph.distribute_slices()
        graph.remove_dead()
        return PassResult(tuple(records))
