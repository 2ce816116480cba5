"""See the last two axes exchanged behind a view that joins the others, and parted again, as one permutation."""

from __future__ import annotations

from dotresize_fx.graph import Graph
from dotresize_fx.passes.pass_base import Pass, PassResult


class JoinPermutations(Pass):
    """``view(permute(view(k, (b * h, n, d)), (0, 2, 1)), (b, h, d, n))`` becomes ``permute(k, (0, 1, 3, 2))``.

    So an exporter turns the keys of an attention round that it spells op by op.
    """

    def call(self, graph: Graph) -> PassResult:
        records = graph.join_permutations()
        graph.remove_dead()
        return PassResult(tuple(records))
