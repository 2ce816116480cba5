"""A stream's basis by what its readers lose: principal components, turned until what all readers put out is nearest."""

from __future__ import annotations

import torch

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region
from dotresize_fx.solvers.pca import solve_pca

STEPS = 60
# L-BFGS stops at gradients of a fixed size; the loss is a sum of small shares.
SCALE = 100.0


def solve_read_basis(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
    """Leave out the span of D (n, n - width) with D.T D = I for which the sum over the norms of

        tr(D D.T C D D.T A),   C the second moments behind the norm, A the metric of what reads there,

    is least: the error of all readers' outputs, relative to each one's. L-BFGS on D = Q of a QR, begun at the least
    principal components or at what readers feel least, whichever is better. Principal components are the answer where
    no metric is known or nothing is left out.

    Raises:
        UsageError: the region does not admit rotations.
    """
    start = solve_pca(region, statistics, width)
    if width == region.width or not statistics.sights:
        return start
    moments = torch.stack([moment for moment, _ in statistics.sights])
    metrics = torch.stack([metric for _, metric in statistics.sights])
    left_out = torch.linalg.eigh(statistics.gram).eigenvectors[:, : region.width - width]

    def loss(span: torch.Tensor) -> torch.Tensor:
        seen = span.T @ moments @ span
        return (seen * (span.T @ metrics @ span)).sum()

    unread = torch.linalg.eigh(metrics.sum(0)).eigenvectors[:, : region.width - width]
    first = min(left_out, unread, key=lambda span: float(loss(span)))  # the search is a local one
    free = first.contiguous().clone(memory_format=torch.contiguous_format).requires_grad_()
    search = torch.optim.LBFGS([free], max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe")

    def evaluate() -> torch.Tensor:
        search.zero_grad()
        found = SCALE * loss(torch.linalg.qr(free).Q)
        found.backward()  # type: ignore[no-untyped-call]
        return found

    with torch.enable_grad():
        search.step(evaluate)
    span = torch.linalg.qr(free.detach()).Q
    before, after = float(loss(left_out)), float(loss(span))
    if not after < before:
        return start
    kept = torch.linalg.eigh(span @ span.T).eigenvectors[:, :width]
    return RegionMap(kept, kept.T, notes={"readers' loss, of principal components": before, "readers' loss": after})
