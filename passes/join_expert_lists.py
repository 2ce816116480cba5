"""See experts that a loop multiplies one by one as one product of rows with each expert's own matrix."""

from __future__ import annotations

from dotresize_fx.graph import Graph
from dotresize_fx.passes.pass_base import Pass, PassResult


class JoinExpertLists(Pass):
    """``cat([linear(rows, W[i]) for i, rows in enumerate(split(x, counts))])`` becomes one product, W's experts routed.

    Where ``counts`` are read from a tensor, so that each expert's rows end at its running sum. Experts with biases of
    their own, and lists that leave one out, stay.
    """

    def call(self, graph: Graph) -> PassResult:
        records = graph.join_expert_lists()
        graph.remove_dead()
        return PassResult(tuple(records))
