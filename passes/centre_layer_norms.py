"""Turn the layer norms of a stream into RMSNorms by centring what is written into the stream.

LayerNorm(x) = RMSNorm(x - mean(x)). If every writer's output has mean zero over the width, so has the stream, and
the subtraction can go (Ashkboos et al. 2024, "SliceGPT", section 3.1).
"""

from __future__ import annotations

import torch

from dotresize_fx.graph import Graph, Kind, Op
from dotresize_fx.passes.pass_base import Pass, PassResult, promise
from dotresize_fx.passes.region_ends import tables_of
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
        why = why_not_centred(graph, self.region)
        promise(not why, why)

    def call(self, graph: Graph) -> PassResult:
        norms = [graph.op(name) for name in self.region.norms]
        layer_norms = [op for op in norms if op.kind is Kind.LAYER_NORM]
        if not layer_norms:
            return PassResult()
        tied = set(_tied_readers(graph, self.region))
        for name in self.region.writers:
            op = graph.op(name)
            # What only a tied head reads is not the stream; the tie alone makes it one region with it.
            if not {user.name for user in graph.users(op.output)} <= tied:
                self._centre(graph, op)
        for table in tables_of(graph, self.region):
            numbers = graph.parameter(table).double()
            graph.set_parameter(table, (numbers - numbers.mean(-1, keepdim=True)).to(graph.parameter(table).dtype))
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

    def ensures(self, graph: Graph) -> None:
        promise(
            not any(op.kind is Kind.LAYER_NORM and op.name in self.region.norms for op in graph.ops),
            "a layer norm is left",
        )


def why_not_centred(graph: Graph, region: Region) -> str:
    """Why a stream's layer norms cannot become RMSNorms; empty when they can, or when there are none."""
    kinds = {graph.op(name).kind for name in region.norms}
    if Kind.LAYER_NORM not in kinds:
        return ""
    if len(kinds) > 1:
        return "layer norms and RMSNorms act on one stream"
    tied = _tied_readers(graph, region)
    bare = set(region.readers) - set(region.normed_readers)
    missing = {name for name in bare if name not in tied or not _reads_its_own(graph, region, graph.op(name), tied)}
    return f"{min(missing)} reads it without a norm, and would miss its mean" if missing else ""


def _reads_its_own(graph: Graph, region: Region, reader: Op, tied: list[str]) -> bool:
    """Whether what a tied head reads is written for tied heads alone, and so keeps its mean."""
    writer = graph.producer(reader.inputs[0])
    if writer is None or writer.name not in region.writers:
        return False
    return {user.name for user in graph.users(writer.output)} <= set(tied)


def _tied_readers(graph: Graph, region: Region) -> list[str]:
    embeddings = {graph.op(name).weight for name in region.writers if graph.op(name).kind is Kind.EMBEDDING}
    return [name for name in region.readers if graph.op(name).weight in embeddings]
