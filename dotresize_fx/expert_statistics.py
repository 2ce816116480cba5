"""Experts: Gram matrices of the rows that were routed to each, and solvers that treat each like an FFN of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from dotresize_fx.gram import GramAccumulator, RegionStatistics
from dotresize_fx.ranks import Ranks
from dotresize_fx.region_map import RegionMap, stacked
from dotresize_fx.regions import Region, RegionKind

Solve = Callable[[Region, RegionStatistics, int], RegionMap]
Curve = Callable[[Region, RegionStatistics], torch.Tensor]


class ExpertGrams(GramAccumulator):
    """Sums x.T @ x over the rows of each expert. ``gram`` is (experts, n, n) float64, ``counts`` (experts,) rows."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.counts = torch.zeros(experts, dtype=torch.int64)

    def add_routed(self, x: torch.Tensor, ends: torch.Tensor, real: torch.Tensor | None) -> None:
        """x: (rows, n) in the order of the experts; ends: (experts,) where each one's rows end; real: (rows,) bool,
        which of them are of real tokens, or None for all.
        """
        if self.tokens == 0:
            self._start(x)
        start = 0
        for expert, end in enumerate(ends.tolist()):
            self._add(expert, x[start:end] if real is None else x[start:end][real[start:end]])
            start = end

    def add_of_all(self, x: torch.Tensor, real: torch.Tensor | None) -> None:
        """x: (experts, rows, n), where each expert sees all rows; real: (rows,) bool. Rows of zeros are none of an
        expert's: its router multiplied them by 0.
        """
        if self.tokens == 0:
            self._start(x)
        for expert, rows in enumerate(x if real is None else x[:, real]):
            self._add(expert, rows[rows.any(-1)])

    def add_up(self, ranks: Ranks, device: torch.device, names: Sequence[str] = ()) -> None:
        super().add_up(ranks, device, names)
        if ranks.count > 1:
            self.counts = ranks.sum(self.counts.to(device)).to(self.counts.device)

    def _start(self, x: torch.Tensor) -> None:
        n = x.shape[-1]
        self.gram = torch.zeros(len(self.counts), n, n, dtype=torch.float64, device=x.device)

    def _add(self, expert: int, rows: torch.Tensor) -> None:
        if len(rows):
            self._add_square(self._gram[expert], rows)
        self.counts[expert] += len(rows)
        self.tokens += len(rows)


def expert_statistics(sums: ExpertGrams, reader_weight: torch.Tensor) -> RegionStatistics:
    """Means over all rows, so that an expert counts as often as it is asked: gram (experts, n, n).

    An expert that saw fewer rows than it has neurons is told from its weights for what its rows do not say: its Gram
    matrix gets the mean square of all experts' neurons on the diagonal, in the measure that rows are missing.

    reader_weight: (experts, out, n) float64.
    """
    n = sums.gram.shape[-1]
    gram = sums.gram / max(sums.tokens, 1)
    missing = (1 - sums.counts.to(gram) / n).clamp_min(0)
    even = gram.diagonal(dim1=-2, dim2=-1).mean()
    gram = gram + (missing * even)[:, None, None] * torch.eye(n).to(gram)
    return RegionStatistics(tokens=sums.tokens, gram=gram, reader_weight=reader_weight, expert_rows=sums.counts)


def each_expert(region: Region, statistics: RegionStatistics) -> list[tuple[Region, RegionStatistics]]:
    """Every expert as an FFN of its own. Their lists of eliminations are kept with the whole's."""
    assert statistics.reader_weight is not None
    alone = replace(region, kind=RegionKind.FFN)
    while len(statistics.of_experts) < len(statistics.gram):
        expert = len(statistics.of_experts)
        statistics.of_experts.append(
            RegionStatistics(
                tokens=statistics.tokens,
                gram=statistics.gram[expert],
                reader_weight=statistics.reader_weight[expert],
            )
        )
    return [(alone, part) for part in statistics.of_experts]


def per_expert(solve: Solve) -> Solve:
    """The FFN's solver for each expert, and readers that make the best of what is left: (experts, n, k) maps."""

    def solve_experts(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
        found = stacked([solve(alone, part, width) for alone, part in each_expert(region, statistics)])
        few = 0 if statistics.expert_rows is None else int((statistics.expert_rows < region.width).sum())
        notes = {"experts that saw fewer tokens than they have neurons": few} if few else {}
        return replace(found, notes=notes)

    return solve_experts


def per_expert_curve(curve: Curve) -> Curve:
    """The sum over experts of what each loses at a width."""

    def of_all(region: Region, statistics: RegionStatistics) -> torch.Tensor:
        return torch.stack([curve(alone, part) for alone, part in each_expert(region, statistics)]).sum(0)

    return of_all


def refit_experts(found: RegionMap, gram: torch.Tensor, reader_weight: torch.Tensor, *, ridge: float) -> torch.Tensor:
    """(experts, out, k): what reads the kept neurons so that each expert puts out what it did, by least squares.

    gram: (experts, n, n); reader_weight: (experts, out, n). ``ridge`` is in units of the kept neurons' mean square.
    """
    down = found.down
    kept = down.mT @ gram @ down
    size = kept.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(kept.dtype).tiny)
    kept = kept + ridge * size[:, None, None] * torch.eye(kept.shape[-1]).to(kept)
    fitted: torch.Tensor = torch.linalg.solve(kept, down.mT @ gram @ reader_weight.mT).mT
    return fitted


def experts_error(gram: torch.Tensor, weight: torch.Tensor, reader_weight: torch.Tensor) -> float:
    """||slim - dense|| / ||dense|| of what experts put out; weight: (experts, out, n), the slim reader's."""
    energy = torch.einsum("eon,enm,eom->", reader_weight, gram, reader_weight)
    change = weight - reader_weight
    lost = torch.einsum("eon,enm,eom->", change, gram, change)
    return float((lost / energy.clamp_min(torch.finfo(gram.dtype).tiny)).clamp_min(0).sqrt())
