"""See a convolution of single pixels (1x1) as a linear of each pixel's channels."""

from __future__ import annotations

from dotresize_fx.graph import Graph
from dotresize_fx.passes.pass_base import Pass, PassResult


class RecognisePointwise(Pass):
    """``conv2d(x, W, b)`` of a 1x1 kernel becomes ``permute(linear(permute(x), W.flatten(1), b))``, channels last.

    Where it steps over pixels, pads or has groups it stays. What becomes ONNX is a convolution again
    (:meth:`dotresize_fx.fx_form.graph.FxGraph.restore_pointwise`).
    """

    def call(self, graph: Graph) -> PassResult:
        return PassResult(tuple(graph.recognise_pointwise()))
