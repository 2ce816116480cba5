"""Second-order elimination: drop the neuron whose loss the others make good best, make it good, repeat.

Structured optimal brain surgeon on a region's Gram matrix (Hassibi & Stork 1993, "Second order derivatives for
network pruning"; by columns as in Kurtić et al. 2023, "ZipLM", equation 3): with H the Gram matrix of what the reader
sees and W its weight, dropping column j and adjusting the others costs ||w_j||² / [H⁻¹]_jj of squared output error,
and H⁻¹ and W of the rest follow by one elimination step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dotresize_fx.errors import SolverError, UsageError
from dotresize_fx.gram import RegionStatistics
from dotresize_fx.least_squares import diagonal_raised
from dotresize_fx.region_map import RegionMap, selection
from dotresize_fx.regions import Region, Symmetry

# Relative to each neuron's own second moment, so that a few massive activations do not drown the others; it keeps
# duplicate neurons, and the floor below dead ones, from making the inverse singular.
DAMPING = 1e-4
FLOOR = 1e-9
# What all-silent neurons are damped by: its inverse is still a number, and so are products of that.
SILENCE = 1e-100
# Neurons that are eliminated before the whole matrices are updated once, and the cheapest ones that they are chosen
# from.
BLOCK = 32
CANDIDATES = 128
# From so many neurons on several go in a step: one in so many of all. So many steps are taken before the matrices are
# updated, among so many times as many candidates as go.
WIDE = 2048
GROUPS = 256
GROUP_STEPS = 8
GROUP_CANDIDATES = 4
# The share of neurons left of those in the matrices at which these are made smaller.
SHRINK = 0.8
# The curve ends at n / EIGHTH: elimination gets no cheaper by what is never asked for.
EIGHTH = 8


@dataclass(frozen=True)
class Elimination:
    """order: (m,) neurons in the order in which they went. error: (m,) squared output error a token after each.

    Both end where ``eliminate`` was told to stop; float64, int64.
    """

    order: torch.Tensor
    error: torch.Tensor


def solve_obs(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
    """Keep the ``width`` neurons that elimination leaves.

    Raises:
        UsageError: the region is not read by one linear behind a nonlinearity.
    """
    if region.symmetry is not Symmetry.PERMUTATION or statistics.reader_weight is None:
        raise UsageError(f"obs eliminates neurons of an FFN; {region.name} is a {region.kind} width")
    count = region.width - width
    known = next((order for order in statistics.eliminations if len(order) >= count), None)
    if known is None:
        known = eliminate(statistics.gram, statistics.reader_weight, count).order
        statistics.eliminations.append(known)
    kept = torch.ones(region.width, dtype=torch.bool, device=known.device)
    kept[known[:count]] = False
    down = selection(kept.nonzero().flatten(), region.width)
    return RegionMap(down, down.T)


def obs_curve(region: Region, statistics: RegionStatistics) -> torch.Tensor:
    """(n + 1,): squared output error a token at each width; float64. One neuron in EIGHTH stays in any case."""
    assert statistics.reader_weight is not None
    n = region.width
    found = eliminate(statistics.gram, statistics.reader_weight, n - n // EIGHTH)
    statistics.eliminations.append(found.order)
    error = found.error
    curve = error.new_full((n + 1,), torch.inf)
    curve[n] = 0
    curve[n - len(error) : n] = error.flip(0)
    return curve


def eliminate(gram: torch.Tensor, weight: torch.Tensor, count: int) -> Elimination:
    """Eliminate ``count`` neurons, in blocks.

    Within a block the steps are exact on the CANDIDATES neurons that are cheapest at its start; only then are the
    whole matrices updated, so that n neurons cost n / BLOCK large products instead of n small ones. Of WIDE neurons
    and more several go in a step, the cheapest, what they cost together counted; in FFNs of text they lose half
    a percent more at most (docs/measurements.md, "Elimination in groups").

    gram: (n, n) float64, mean of x x.T. weight: (out, n) float64.

    Raises:
        SolverError: rounding left no number of what they cost.
    """
    with diagonal_raised(gram, damping(gram)):
        inverse = _inverse(gram)
    rows = weight.T.contiguous()  # a neuron a row: gathering rows is far cheaper than columns
    alive = torch.arange(len(gram), device=gram.device)
    gone = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
    order, errors = [], []
    left, at_once = len(gram), len(gram) // GROUPS if len(gram) >= WIDE else 1
    most = BLOCK if at_once == 1 else GROUP_STEPS * at_once
    among = CANDIDATES if at_once == 1 else GROUP_CANDIDATES * most
    while count > 0:
        # What is gone stays in the matrices as zeros for a while: copying what is left each time would cost more.
        if left < SHRINK * len(alive):
            still = (~gone).nonzero().flatten()
            alive, rows = alive[still], rows[still]
            inverse = inverse.index_select(0, still).index_select(1, still)
            gone = torch.zeros_like(alive, dtype=torch.bool)
        cost = torch.where(gone, torch.inf, torch.linalg.vector_norm(rows, dim=1).square() / inverse.diagonal())
        step = min(most, count)
        candidates = torch.argsort(cost, stable=True)[: min(left, among)]
        few = inverse.index_select(0, candidates).index_select(1, candidates)
        eliminated = rows.index_select(0, candidates)
        if at_once == 1:
            chosen, error = _eliminate_few(few, eliminated, step)
        else:
            chosen, error = _eliminate_groups(few, eliminated, step, at_once)
        block = candidates[chosen]
        order.append(alive[block])
        errors.append(error)
        beside = inverse.index_select(0, block)
        factor = torch.linalg.inv_ex(beside.index_select(1, block)).inverse @ beside  # does not wait for the device
        rows.addmm_(factor.T, rows.index_select(0, block), alpha=-1)
        inverse.addmm_(factor.T, beside, alpha=-1)
        gone.index_fill_(0, block, True)  # a number that is assigned would be waited for
        left -= step
        count -= step
    if not order:
        return Elimination(alive[:0], gram.new_zeros(0))
    error = torch.cat(errors).cumsum(0)
    if not error[-1].isfinite():
        raise SolverError("elimination met neurons whose Gram matrix is singular, damped as it is")
    return Elimination(torch.cat(order), error)


def _inverse(matrix: torch.Tensor) -> torch.Tensor:
    root, failed = torch.linalg.cholesky_ex(matrix)
    return torch.linalg.inv(matrix) if failed.item() else torch.cholesky_inverse(root)


def damping(gram: torch.Tensor) -> torch.Tensor:
    """(n,) what is added to the diagonal of a Gram matrix before it is inverted."""
    moments = gram.diagonal()
    floor = (FLOOR * moments.mean()).clamp_min(SILENCE)
    return DAMPING * moments + floor


def _eliminate_few(inverse: torch.Tensor, rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact steps on a small (m, m) inverse and the weight's m columns as rows; (indices, added error of each step).

    On the CPU whatever the device: a step is so little work that launching it on a GPU takes longer.
    """
    device = inverse.device
    # Only inner products of the weight's columns matter, and the same elimination updates them.
    products, inverse = (rows @ rows.T).cpu(), inverse.cpu().clone()
    open_cost = torch.zeros(len(inverse), dtype=inverse.dtype)
    chosen, errors = [], []
    tiny = torch.finfo(inverse.dtype).tiny
    lengths, pivots = products.diagonal(), inverse.diagonal()
    for _ in range(count):
        cost = lengths.clamp_min(0) / pivots.clamp_min(tiny) + open_cost
        j = int(cost.argmin())
        chosen.append(j)
        errors.append(cost[j])
        factor = inverse[j] / inverse[j, j]
        # products - c f.T - f c.T + c_j f f.T in two rank-one updates
        half = products[:, j] - 0.5 * products[j, j] * factor
        products.addr_(half, factor, alpha=-1).addr_(factor, half, alpha=-1)
        inverse.addr_(inverse[:, j].clone(), factor, alpha=-1)
        open_cost[j] = torch.inf
    return torch.tensor(chosen, device=device), torch.stack(errors).to(device)


def _eliminate_groups(
    inverse: torch.Tensor, rows: torch.Tensor, count: int, at_once: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`_eliminate_few`, ``at_once`` cheapest neurons J a step, which add tr([H⁻¹]_JJ⁻¹ W.T_J W_J) together:
    each is told an equal part of it. Where the matrices are, which no step leaves.
    """
    products, given, inverse = rows @ rows.T, inverse, inverse.clone()
    gone = torch.zeros(len(inverse), dtype=torch.bool, device=inverse.device)
    tiny = torch.finfo(inverse.dtype).tiny
    chosen, errors, failed = [], [], []
    for start in range(0, count, at_once):
        size = min(at_once, count - start)
        cost = products.diagonal().clamp_min(0) / inverse.diagonal().clamp_min(tiny)
        group = torch.where(gone, torch.inf, cost).topk(size, largest=False).indices
        beside, among = inverse.index_select(0, group), products.index_select(0, group)
        square = among.index_select(1, group)
        # One factorisation for all that is divided by the pivots; unlike others it does not wait for the device.
        root, info = torch.linalg.cholesky_ex(beside.index_select(1, group))
        failed.append(info)
        divided = torch.cholesky_solve(torch.cat([beside, square], 1), root)
        factor, added = divided[:, :-size], divided[:, -size:]
        # products - P f - f.T P.T + f.T P_JJ f in two products, P being the group's columns
        half = among.T - 0.5 * factor.T @ square
        errors.append(added.diagonal().sum() / size)
        products.addmm_(half, factor, alpha=-1).addmm_(factor.T, half.T, alpha=-1)
        inverse.addmm_(beside.T, factor, alpha=-1)
        gone.index_fill_(0, group, True)
        chosen.append(group)
    if torch.stack(failed).any():  # neurons that say the same: one by one
        return _eliminate_few(given, rows, count)
    return torch.cat(chosen), torch.stack([error for error, part in zip(errors, chosen, strict=True) for _ in part])
