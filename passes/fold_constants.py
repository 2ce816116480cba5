"""Store what is computed from parameters alone, such as a gain spelled as one plus a parameter, as a parameter."""

from __future__ import annotations

from dotresize_fx.graph import Graph
from dotresize_fx.passes.pass_base import Pass, PassResult

# Vectors of gains and biases; what is larger, a table of positions say, stays computed.
LARGEST = 65_536


class FoldConstants(Pass):
    """A vector that only parameters go into becomes a parameter of its own."""

    def call(self, graph: Graph) -> PassResult:
        records = graph.fold_constants(LARGEST)
        graph.remove_dead()
        return PassResult(tuple(records))
