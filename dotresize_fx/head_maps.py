"""A map of one head's width, or of whole heads, written out for all heads of a linear."""

from __future__ import annotations

import torch

from dotresize_fx.region_map import RegionMap, selection
from dotresize_fx.regions import ATTENTION_KINDS, Region, RegionKind


def over_heads(region: Region, matrix: torch.Tensor, width: int) -> torch.Tensor:
    """The matrix that ``matrix``, a map's down or up, is for a linear whose dimension is ``width`` in all.

    HEADS: the Kronecker product with the identity of one KV head's share of ``width``. Else one block per head of
    the linear: from (a, b) the same for all, from (heads, a, b) that of the KV head which query heads share, KV
    heads outermost. (heads, a, heads, b) is a map across KV heads, which nothing admits (for proofs). Any other
    region's matrix stays as it is.

    Raises:
        ValueError: the sizes do not go with each other.
    """
    if region.kind not in ATTENTION_KINDS:
        return matrix
    if width % region.width:
        raise ValueError(f"{region.name}: {width} is no multiple of {region.width}")
    share = width // region.width
    if region.kind is RegionKind.HEADS:
        return torch.kron(matrix.contiguous(), torch.eye(share, dtype=matrix.dtype, device=matrix.device))
    if share % region.heads or (matrix.ndim > 2 and len(matrix) != region.heads):
        raise ValueError(f"{region.name}: a map of {len(matrix)} heads for {share} heads over {region.heads} KV heads")
    if matrix.ndim < 4:
        own = torch.eye(region.heads, dtype=matrix.dtype, device=matrix.device)
        matrix = torch.einsum("iab,ij->iajb", matrix.expand(region.heads, *matrix.shape[-2:]), own)
    heads, a, _, b = matrix.shape
    same = torch.eye(share // heads, dtype=matrix.dtype, device=matrix.device)
    written: torch.Tensor = torch.einsum("iajb,gh->igajhb", matrix, same).reshape(share * a, share * b)
    return written


def at_dense_width(region: Region, found: RegionMap, down: torch.Tensor) -> torch.Tensor:
    """(..., n, n): ``down`` (..., n, k) of a map of queries and keys, its k numbers lying in a head of n, others zero.

    Rotary pairs lie where the dense tables turn them as they are to be turned. Where nothing rotates any k places do,
    the same on both sides: the first.
    """
    half = region.width // 2
    places = torch.arange(found.width) if found.pairs is None else torch.cat([found.pairs, found.pairs + half])
    return down @ selection(places.to(down.device), region.width).T
