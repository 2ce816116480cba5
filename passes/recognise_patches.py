"""See a vision model's patch embedding, a convolution that steps by its own size, as a linear."""

from __future__ import annotations

from dotresize_fx.graph import Graph
from dotresize_fx.passes.pass_base import Pass, PassResult


class RecognisePatches(Pass):
    """``transpose(flatten(conv2d(image, W, b, stride=size)))`` becomes ``linear(patches, W.flatten(1), b)``.

    The patches are views of the image. Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section 3.1. Where
    patches overlap, are padded or leave pixels out, the convolution stays.
    """

    def call(self, graph: Graph) -> PassResult:
        records = graph.recognise_patches()
        graph.remove_dead()
        return PassResult(tuple(records))
