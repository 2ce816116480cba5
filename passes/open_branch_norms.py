"""Take the gains out of the norms that write a stream: what they put out is then written by a linear of its own."""

from __future__ import annotations

import torch

from dotresize_fx.graph import Graph
from dotresize_fx.passes.close_dimension import NORMS
from dotresize_fx.passes.pass_base import Pass, PassResult, promise
from dotresize_fx.regions import Region


class OpenBranchNorms(Pass):
    """``stream + norm(y) * g + b`` becomes ``stream + linear(norm(y), diag(g), b)``.

    Exact. The linear is what it costs to change the basis of a stream that sandwich norms write: a map folds into it,
    and it stays, n x k weights for each such norm.
    """

    def __init__(self, region: Region) -> None:
        self.region = region

    def call(self, graph: Graph) -> PassResult:
        records = []
        for name in self.region.writers:
            norm = graph.op(name)
            if norm.kind not in NORMS:
                continue
            width = norm.output.width
            assert width is not None
            like = next(graph.weight(graph.op(other)) for other in self.region.readers)
            gain = torch.ones(width).to(like) if norm.weight is None else graph.weight(norm)
            bias = graph.bias(norm)
            name = f"{norm.name}_gain"
            graph.insert_linear(norm.output, torch.diag(gain), None if bias is None else bias.clone(), name=name)
            graph.drop_affine(graph.op(norm.name))
            records.append(f"{norm.name}: its gain made a linear that writes the stream")
        graph.remove_dead()
        return PassResult(tuple(records))

    def ensures(self, graph: Graph) -> None:
        left = [name for name in self.region.writers if graph.op(name).kind in NORMS and graph.op(name).weight]
        promise(not left, f"norms that write the stream keep gains: {left}")
