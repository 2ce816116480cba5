"""See views that do several things at once, or by a detour, as what the other passes know."""

from __future__ import annotations

from dotresize_fx.graph import Graph
from dotresize_fx.passes.pass_base import Pass, PassResult


class NormaliseViews(Pass):
    """``view(permute(view(k, (b * h, n, d)), (0, 2, 1)), (b, h, d, n))`` becomes ``permute(k, (0, 1, 3, 2))``, and
    ``view(x, (b * n, h * d))`` of ``(b, n, h, d)`` becomes two: heads are joined first, and then rows.

    So exporters turn the keys of an attention round, and put what was mixed in front of a product of matrices.
    """

    def call(self, graph: Graph) -> PassResult:
        records = graph.normalise_views()
        graph.remove_dead()
        return PassResult(tuple(records))
