"""Turn the layer norms of a stream into RMSNorms by centring what is written into the stream.

LayerNorm(x) = RMSNorm(x - mean(x)). If every writer's output has mean zero over the width, so has the stream, and
the subtraction can go (Ashkboos et al. 2024, "SliceGPT", section 3.1).
"""

from __future__ import annotations

import torch

from dotresize_fx.graph import Graph, Kind, Op
from dotresize_fx.passes.pass_base import Pass, PassResult, promise
from dotresize_fx.regions import Region


class CentreLayerNorms(Pass):
    """Every writer of the region is centred; its layer norms, whose gains were folded before, become RMSNorms.

    A table that a head shares keeps its values, since the head reads its mean too: an explicit centring linear
    behind the lookup takes the mean away, and a later map folds into that linear.
    """

    def __init__(self, region: Region) -> None:
        self.region = region

    def requires(self, graph: Graph) -> None:
        for name in self.region.norms:
            norm = graph.op(name)
            promise(norm.weight is None and norm.bias is None, f"{name} has a gain: fold it first")
        if not any(graph.op(name).kind is Kind.LAYER_NORM for name in self.region.norms):
            return
        tied = self._tied_readers(graph)
        bare = set(self.region.readers) - set(self.region.normed_readers)
        promise(
            bare <= set(tied) and all(self._reads_its_own(graph, graph.op(name), tied) for name in bare),
            "a reader sees the stream without a norm, and would miss its mean",
        )

    def call(self, graph: Graph) -> PassResult:
        norms = [graph.op(name) for name in self.region.norms]
        layer_norms = [op for op in norms if op.kind is Kind.LAYER_NORM]
        if not layer_norms:
            return PassResult()
        promise(len(layer_norms) == len(norms), "layer norms and RMSNorms on one stream")
        tied = set(self._tied_readers(graph))
        for name in self.region.writers:
            op = graph.op(name)
            # What only a tied head reads is not the stream; the tie alone makes it one region with it.
            if not {user.name for user in graph.users(op.output)} <= tied:
                self._centre(graph, op)
        for norm in layer_norms:
            graph.make_rms_norm(graph.op(norm.name))
        graph.remove_dead()
        return PassResult((f"{len(layer_norms)} layer norms turned into RMSNorms by centring their writers",))

    def _centre(self, graph: Graph, op: Op) -> None:
        weight = graph.weight(op)
        assert op.weight is not None
        if any(user.kind is not op.kind for user in graph.users(op.weight)):
            if op.kind is Kind.EMBEDDING:
                width = weight.shape[1]
                centring = torch.eye(width, dtype=torch.float64, device=weight.device) - 1.0 / width
                graph.insert_linear(op.output, centring.to(weight.dtype), name=f"{op.name}_centred")
            return
        axis = -2 if op.is_linear else 1
        exact = weight.double()
        graph.set_weight(op, (exact - exact.mean(axis, keepdim=True)).to(weight.dtype))
        bias = graph.bias(op)
        if bias is not None:
            graph.set_bias(graph.op(op.name), (bias.double() - bias.double().mean()).to(bias.dtype))

    def _reads_its_own(self, graph: Graph, reader: Op, tied: list[str]) -> bool:
        """Whether what a tied head reads is written for tied heads alone, and so keeps its mean."""
        writer = graph.producer(reader.inputs[0])
        if writer is None or writer.name not in self.region.writers:
            return False
        return {user.name for user in graph.users(writer.output)} <= set(tied)

    def _tied_readers(self, graph: Graph) -> list[str]:
        embeddings = {graph.op(name).weight for name in self.region.writers if graph.op(name).kind is Kind.EMBEDDING}
        return [name for name in self.region.readers if graph.op(name).weight in embeddings]

    def ensures(self, graph: Graph) -> None:
        promise(
            not any(op.kind is Kind.LAYER_NORM and op.name in self.region.norms for op in graph.ops),
            "a layer norm is left",
        )
