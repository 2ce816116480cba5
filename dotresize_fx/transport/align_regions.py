"""Maps of full width that bring a region's basis near that of the same region in another block.

Two blocks may do the same in other bases: averaging their weights means something once neurons, heads and what is
inside a head are matched, as model fusion by optimal transport does (Singh & Jaggi 2020, "Model Fusion via Optimal
Transport"; permutations: Ainsworth et al. 2023, "Git Re-Basin"). Each map is one that the region's symmetry admits, so
the block computes what it did. Neurons and heads are matched by their weights, heads by what no basis inside them
changes: the products of queries with keys and of outputs with values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dotresize_fx.graph import Graph, Op
from dotresize_fx.region_map import RegionMap, selection
from dotresize_fx.regions import Region, Symmetry
from dotresize_fx.rotary_map import real_matrix
from dotresize_fx.transport.assignment import assign


def align_neurons(graph: Graph, region: Region, like: Region) -> RegionMap:
    """Of an FFN: neurons in the order of those of ``like``; where a scale passes, that too is what theirs is.

    The linear branch of a gate product and the reader are compared by their outer product, which the scale between
    them leaves alone; for a match the branch takes the sign and the size that the other's has.
    """
    (one, branch, read), (other, other_branch, other_read) = (_neurons(graph, part) for part in (like, region))
    score = one @ other.T
    if branch is None or other_branch is None:
        order = assign(score + read @ other_read.T)
        down = selection(order, region.width)
        return RegionMap(down, down.T)
    sizes = [(a.norm(dim=1) * b.norm(dim=1)).sqrt() for a, b in ((branch, read), (other_branch, other_read))]
    tiny = torch.finfo(torch.float64).tiny
    outer = (branch @ other_branch.T) * (read @ other_read.T)
    order = assign(score + 2 * outer / torch.outer(*sizes).clamp_min(tiny))
    down = selection(order, region.width)
    matched, reads = other_branch[order], other_read[order]
    ratio = branch.norm(dim=1) * reads.norm(dim=1) / (matched.norm(dim=1) * read.norm(dim=1)).clamp_min(tiny)
    sign = torch.where((branch * matched).sum(1) < 0, -1.0, 1.0).double()
    scale = torch.where(ratio > 0, ratio, 1.0).sqrt() * sign
    return RegionMap(down, (down / scale).T, branch_down=down * scale)


def _neurons(graph: Graph, region: Region) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Rows (n, ...) of the writers, of the linear branch's if there is one, and of the reader; biases as columns."""
    writers = [graph.op(name) for name in region.writers if name not in region.linear_branch]
    branch = [_rows(graph, graph.op(name)) for name in region.linear_branch]
    written = torch.cat([_rows(graph, op) for op in writers], 1)
    (reader,) = (graph.op(name) for name in region.readers)
    return written, torch.cat(branch, 1) if branch else None, graph.weight(reader).double().T


def _rows(graph: Graph, op: Op) -> torch.Tensor:
    weight, bias = graph.weight(op).double(), graph.bias(op)
    return weight if bias is None else torch.cat([weight, bias.double()[:, None]], 1)


@dataclass(frozen=True)
class HeadWeights:
    """Of one attention, all (KV heads, query heads a KV head or 1, ...), float64; None where not known.

    values: (h, 1, n, in) and what reads them (h, g, out, n). scores: keys (h, 1, m, in) and queries (h, g, m, in). A
    bias is one more column of ``in``. ``rotary``: numbers j and j + m/2 of queries and keys are a pair.
    """

    values: tuple[torch.Tensor, torch.Tensor] | None = None
    scores: tuple[torch.Tensor, torch.Tensor] | None = None
    rotary: bool = False

    @classmethod
    def of(cls, graph: Graph, value: Region | None, query_key: Region | None) -> HeadWeights:
        """From the regions of one attention, each with one writer a side."""
        values: Pair | None = None
        scores: Pair | None = None
        if value is not None:
            (writer,), (reader,) = value.writers, value.readers
            read = _split(graph.weight(graph.op(reader)).double().T, value)
            values = _split(_rows(graph, graph.op(writer)), value), read.mT
        if query_key is not None:
            (key,) = query_key.key_writers
            (query,) = (name for name in query_key.writers if name != key)
            keys, queries = (_split(_rows(graph, graph.op(name)), query_key) for name in (key, query))
            scores = keys, queries
        return cls(values, scores, query_key is not None and query_key.symmetry is Symmetry.ROTARY_PAIRS)


def _split(rows: torch.Tensor, region: Region) -> torch.Tensor:
    return rows.view(region.heads, -1, region.width, rows.shape[1])


def align_heads(own: HeadWeights, like: HeadWeights) -> torch.Tensor:
    """(heads,) int64: for each KV head of ``like`` the one of ``own`` that computes what is most like it.

    Both know their values or both their scores.
    """
    found = []
    if own.values and like.values:
        found.append(_alike(_same_outputs, like.values, own.values))
    if own.scores and like.scores:
        found.append(_alike(_same_turned if own.rotary else _same_scores, like.scores, own.scores))
    return assign(torch.stack(found).sum(0))


Pair = tuple[torch.Tensor, torch.Tensor]


def _alike(product: Callable[[Pair, Pair], torch.Tensor], one: Pair, other: Pair) -> torch.Tensor:
    """(h, k) cosines from the inner products of what heads compute."""
    sizes = [product(part, part).diagonal().clamp_min(0).sqrt() for part in (one, other)]
    return product(one, other) / torch.outer(*sizes).clamp_min(torch.finfo(torch.float64).tiny)


def _same_outputs(one: Pair, other: Pair) -> torch.Tensor:
    """(h, k): inner products of what makes outputs of inputs."""
    outputs = torch.einsum("hgon,kgom->hknm", one[1], other[1])
    return torch.einsum("hknm,hinc,kimc->hk", outputs, one[0], other[0])


def _same_scores(one: Pair, other: Pair) -> torch.Tensor:
    """(h, k): inner products of what makes scores of two inputs."""
    queries = torch.einsum("hgnc,kgmc->hknm", one[1], other[1])
    return torch.einsum("hknm,hinc,kimc->hk", queries, one[0], other[0])


def _same_turned(one: Pair, other: Pair) -> torch.Tensor:
    """The same of rotary pairs, each a complex number: what a phase common to queries and keys leaves alone."""
    keys = torch.einsum("hipc,kipc->hkp", _pairs(one[0]).conj(), _pairs(other[0]))
    queries = torch.einsum("hgpc,kgpc->hkgp", _pairs(one[1]).conj(), _pairs(other[1]))
    return torch.einsum("hkgp,hkp->hk", queries.conj(), keys).real


def _pairs(rows: torch.Tensor) -> torch.Tensor:
    """(..., m, in) -> (..., m/2, in) complex."""
    return torch.complex(*rows.chunk(2, -2))


def align_values(own: Pair, like: Pair) -> RegionMap:
    """Per KV head the rotation of its values that brings them, and what reads them, nearest; both as HeadWeights has
    them.
    """
    near = torch.einsum("hinc,himc->hnm", own[0], like[0]) + torch.einsum("hgon,hgom->hnm", own[1], like[1])
    down = rotation_between(near)
    return RegionMap(down, down.mT)


def align_scores(own: Pair, like: Pair, *, rotary: bool) -> RegionMap:
    """The same for keys and queries; where a rotary embedding turns them a phase a pair."""
    if not rotary:
        down = rotation_between(_product(own, like))
        return RegionMap(down, key_down=down)
    near = sum(torch.einsum("hgpc,hgpc->hp", _pairs(a).conj(), _pairs(b)) for a, b in zip(own, like, strict=True))
    assert isinstance(near, torch.Tensor)
    size = near.abs()
    phase = torch.where(size > 0, near / size.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    down = real_matrix(torch.diag_embed(phase))
    return RegionMap(down, key_down=down, pairs=torch.arange(near.shape[1]))


def _product(own: Pair, like: Pair) -> torch.Tensor:
    """(h, n, m): A.T B of keys and queries together."""
    keys, queries = (torch.einsum("hgnc,hgmc->hnm", a, b) for a, b in zip(own, like, strict=True))
    return keys + queries


def rotation_between(near: torch.Tensor) -> torch.Tensor:
    """(..., n, n): the orthogonal R of the largest <R, near>; of near = A.T B that with A R nearest to B (Schönemann
    1966).
    """
    left, _, right = torch.linalg.svd(near)
    rotation: torch.Tensor = left @ right
    return rotation
