"""DOTResize (arXiv 2507.04517): neurons are transported onto a support of k of them instead of being dropped.

The paper's text was not available beyond its abstract; what it leaves open (cost normalisation, masses, the
inverse) is filled in here and measured. This is a reconstruction.
"""

from __future__ import annotations

import torch

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region, Symmetry
from dotresize_fx.solvers.magnitude import top
from dotresize_fx.solvers.obs import solve_obs
from dotresize_fx.transport.sinkhorn import TransportPlan, sinkhorn

# Entropic weights as a share of the median cost, and how much of a removed neuron is merged into its targets.
EPSILON_ANCHORED = 0.05
EPSILON_STREAM = 0.3
MERGE = 0.1


def solve_dotresize(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
    """A basis of the transported span across an RMSNorm; anchored merging under a nonlinearity.

    Where neurons may not be merged the support alone is left of it.
    """
    if region.symmetry is Symmetry.ORTHOGONAL:
        return _transported_basis(region, statistics, width)
    return _anchored_merge(region, statistics, width)


def _transported_basis(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
    """T = QR of the plan between all channels and the support; Q is written into the stream.

    Channels carry equal masses, targets too; the cost is the mean L1 distance of two channels' activations. With
    T's pseudo-inverse on the reading side R cancels (R T+ = Q.T), so that readers read Q.T.
    """
    if width == region.width:
        identity = torch.eye(width, dtype=torch.float64, device=statistics.gram.device)
        return RegionMap(identity, identity)
    support = top(statistics.activation_norm, width)
    samples = statistics.samples
    if samples is None:
        cost = _distances(statistics.gram)[:, support]
    else:
        channels = samples.T.contiguous()
        cost = torch.cdist(channels, channels[support], p=1) / samples.shape[0]
    plan = sinkhorn(cost, epsilon=_epsilon(cost, EPSILON_STREAM), tolerance=1e-6, max_iterations=2000)
    basis = torch.linalg.qr(plan.plan * region.width).Q
    return RegionMap(basis, basis.T, notes=_notes(plan))


def _anchored_merge(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
    """Kept neurons stay themselves; the removed ones' mass is transported onto them and merged in.

    The support is what second-order elimination keeps. Importance, and mass, is the norm of what a neuron contributes
    to the sublayer's output. The target marginal is free (each removed neuron goes where it is near). The cost of i at
    j is the share of i's output error that is left once the best multiple of j stands in for it, 1 - C_ij² / C_ii C_jj.
    Column j of ``down`` is the mean of neuron j and MERGE times what arrives at it, weighted by mass.
    """
    kept = solve_obs(region, statistics, width)
    if region.keeps_apart:
        return kept
    importance = statistics.activation_norm * statistics.reader_norm
    support = kept.down.argmax(0)
    removed = torch.ones(region.width, dtype=torch.bool, device=importance.device)
    removed[support] = False
    leaving = removed.nonzero().flatten()
    mass = importance[leaving]
    if len(leaving) == 0 or float(mass.sum()) <= 0:
        return kept
    cost = output_error(statistics.gram, leaving, support)
    plan = sinkhorn(
        cost,
        mass / mass.sum(),
        torch.full_like(importance[support], 1.0 / width),
        epsilon=_epsilon(cost, EPSILON_ANCHORED),
        target_relaxation=0.0,
        tolerance=1e-6,
        max_iterations=2000,
    )
    arriving = MERGE * plan.plan * mass.sum()
    total = importance[support] + arriving.sum(0)
    down = torch.zeros_like(kept.down)
    down[leaving] = arriving
    down[support, torch.arange(width, device=support.device)] = importance[support]
    tiny = torch.finfo(torch.float64).tiny
    down /= total.clamp_min(tiny)
    if (silent := (total <= tiny).nonzero().flatten()).numel():
        down[:, silent] = kept.down[:, silent]
    return RegionMap(down, None, notes=_notes(plan))


def output_error(
    gram: torch.Tensor, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
) -> torch.Tensor:
    """(n, n) from 0 to 1: the share of neuron i's contribution that the best multiple of neuron j does not give.

    Of some ``rows`` and ``columns`` (int64 numbers of neurons) alone, where they are given.
    """
    square = gram.diagonal().clamp_min(0)
    own, other = square if rows is None else square[rows], square if columns is None else square[columns]
    gram = gram if rows is None else gram.index_select(0, rows)
    gram = gram if columns is None else gram.index_select(1, columns)
    product = own[:, None] * other[None, :]
    explained = torch.where(product > 0, gram.square() / product.clamp_min(torch.finfo(gram.dtype).tiny), 0)
    return (1 - explained).clamp(0, 1)


def _distances(gram: torch.Tensor) -> torch.Tensor:
    """(n, n) Euclidean distances between the n rows whose inner products are ``gram``."""
    square = gram.diagonal()
    return (square[:, None] + square[None, :] - 2 * gram).clamp_min(0).sqrt()


def _epsilon(cost: torch.Tensor, share: float) -> float:
    positive = cost[cost > 0]
    return share * float(positive.median()) if positive.numel() else share


def _notes(plan: TransportPlan) -> dict[str, float | int | str]:
    return {
        "sinkhorn iterations": int(plan.iterations.max()),
        "marginal error": float(plan.marginal_error.max()),
    }
