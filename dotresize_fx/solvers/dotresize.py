"""DOTResize (arXiv 2507.04517): neurons are transported onto a support of k of them instead of being dropped.

The paper's text was not available beyond its abstract; what it leaves open (cost normalisation, masses, the
inverse) is filled in here and measured. This is a reconstruction.
"""

from __future__ import annotations

import torch

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.region_map import RegionMap, selection
from dotresize_fx.regions import Region, Symmetry
from dotresize_fx.solvers.magnitude import top
from dotresize_fx.transport.sinkhorn import TransportPlan, sinkhorn

# Entropic weights as a share of the median cost, and how much of a removed neuron is merged into its targets.
EPSILON_ANCHORED = 0.02
EPSILON_STREAM = 0.3
MERGE = 0.2


def solve_dotresize(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
    """A basis of the transported span across an RMSNorm; anchored merging under a nonlinearity."""
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

    Importance, and mass, is the norm of what a neuron contributes to the sublayer's output. The target marginal is
    free (each removed neuron goes where it is near), the cost is the distance of what the writers write. Column j
    of ``down`` is the mean of neuron j and MERGE times what arrives at it, weighted by mass.
    """
    importance = statistics.activation_norm * statistics.reader_norm
    support = top(importance, width)
    down = selection(support, region.width)
    removed = torch.ones(region.width, dtype=torch.bool, device=importance.device)
    removed[support] = False
    leaving = removed.nonzero().flatten()
    mass = importance[leaving]
    written = statistics.writer_gram
    if len(leaving) == 0 or float(mass.sum()) <= 0 or written is None:
        return RegionMap(down, down.T)
    cost = _distances(written)[leaving][:, support]
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
    down[leaving] = arriving
    down[support, torch.arange(width, device=support.device)] = importance[support]
    tiny = torch.finfo(torch.float64).tiny
    alive = total > tiny
    down = torch.where(alive, down / total.clamp_min(tiny), selection(support, region.width))
    return RegionMap(down, None, notes=_notes(plan))


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
