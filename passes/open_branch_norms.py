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
            like = graph.weight(graph.op(self.region.readers[0]))
            gain = torch.ones(width).to(like) if norm.weight is None else graph.weight(norm)
            bias = graph.bias(norm)
            bias = None if bias is None else bias.clone()
            graph.insert_linear(norm.output, torch.diag(gain), bias, name=f"{norm.name}_gain")
            graph.drop_affine(graph.op(norm.name))
            records.append(f"{norm.name}: its gain made a linear that writes the stream")
        graph.remove_dead()
        return PassResult(tuple(records))

    def ensures(self, graph: Graph) -> None:
        norms = [op for op in map(graph.op, self.region.writers) if op.kind in NORMS]
        left = [op.name for op in norms if op.weight is not None or op.bias is not None]
        promise(not left, f"norms that write the stream keep gains: {left}")
