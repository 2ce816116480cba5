"""Fewer rotary pairs a head: each pair that goes is merged into one of a near angle, then all are fitted together.

Pairs are complex numbers. A score of query q and key k is the real part of q* D k, D being diagonal, what the distance
turns each pair by. With k slots, slot s turned as pair p(s) is, the narrow head's scores are q* (sum_s B_s D_p(s)) k,
where B_s = conj(a_s) b_s^T has rank one: a_s are the weights of the dense queries' pairs in slot s, b_s those of the
keys' pairs; queries that share a KV head share them. With the second moments Cq and Ck of queries and keys, taken as
independent, and G = E conj(D_s) D_t over distances (:mod:`dotresize_fx.rotary_coherence`), what is minimised is

    E || Cq^(1/2) (D - sum_s B_s D_p(s)) Ck^(1/2) ||^2.

All is done in whitened factors, Cq^(1/2) B_s Ck^(1/2) = u_s v_s^H. Both halves are reconstructed from first principles:
which pairs stay is settled by merging two slots at a time where it loses least, as in Ward's clustering (1963,
"Hierarchical grouping to optimize an objective function"); the rank-one terms are then fitted in turn, each by a step
of power iteration on what the others leave, which never loses more than before.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region, Symmetry
from dotresize_fx.rotary_map import real_matrix
from dotresize_fx.solvers.matrix_root import inverse, square_root
from dotresize_fx.solvers.pair_slots import PairSlots, energies, unit

# Times that every slot is fitted to what the others leave: more changes little, and a curve's shape still less.
ROUNDS = 10
CURVE_ROUNDS = 4
# Shares of the pairs at which a curve is fitted: what merging alone loses is several times as much near the full width.
FITTED_AT = (0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8)
# Of all the energy: less is rounding.
SILENT = 1e-15


@dataclass(frozen=True)
class MergedPairs:
    """``pairs`` (k,) int64, ascending: whose angles are kept; ``queries`` and ``keys`` (heads, n/2, k) complex128: the
    weights of the dense pairs in each; ``lost``: share of the scores' energy.
    """

    pairs: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    lost: float


class RotaryPairs:
    """The pairs of one attention: second moments (heads, n, n) of queries and keys, coherence (n/2, n/2) complex."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, coherence: torch.Tensor) -> None:
        # A few small matrices and many short steps: the CPU is faster.
        self.near = coherence.cpu()
        self.query_root, self.key_root = (square_root(as_complex(side.cpu())) for side in (query, key))

    def merge(self, count: int) -> MergedPairs:
        """Keep ``count`` of the pairs, at least one, by merging two slots at a time where it loses least."""
        slots, kept = next(iter(self._merged({count})[0].values()))
        return self._fitted(slots, kept)

    def merge_into(self, kept: torch.Tensor, places: torch.Tensor) -> MergedPairs:
        """Keep the pairs ``kept`` (k,), ascending; the others, ascending, go into kept[places[i]]."""
        slots, chosen = PairSlots(self.query_root, self.key_root, self.near), kept.tolist()
        gone = [pair for pair in range(len(self.near)) if pair not in chosen]
        for pair, place in zip(gone, places.tolist(), strict=True):
            slots.merge(chosen[place], pair)
        return self._fitted(slots, kept)

    def costs(self) -> torch.Tensor:
        """(n/2, n/2) float64: at (t, s) what merging pair s into pair t loses, in the moments' units; inf for t = s."""
        every = torch.arange(len(self.near))
        return (
            PairSlots(self.query_root, self.key_root, self.near).cost(every[:, None], every).fill_diagonal_(torch.inf)
        )

    def energies(self) -> torch.Tensor:
        """(n/2,) float64: what dropping each pair loses, in the moments' units."""
        return energies(self.query_root, self.key_root)

    def curve(self) -> torch.Tensor:
        """(n/2 + 1,) float64: the scores' energy that is lost at each number of pairs, in the moments' units; falling.

        What merging loses, less what fitting wins back of it: the share that is left after it is found at some numbers
        of pairs and taken to lie on straight lines between them.
        """
        half, whole = len(self.near), self._whole()
        fitted, merged = self._merged(
            {max(1, round(share * half)) for share in FITTED_AT if round(share * half) < half}
        )
        steps = torch.tensor(merged, dtype=torch.float64)
        lost = torch.cat([steps.cumsum(0).flip(0), steps.new_zeros(1)])  # at 1 to n/2 pairs
        known, left = [half], [1.0]
        for count, (slots, kept) in fitted.items():  # the most pairs first
            after = self._energy(*self._fit(slots, kept, CURVE_ROUNDS), kept)
            known, left = [count, *known], [after / max(float(lost[count - 1]), whole * SILENT), *left]
        if len(left) > 1:
            left[-1] = left[-2]
        lost = lost * lost.new_tensor(_between(known, left, half)).clamp(0, 1)
        # More pairs never lose more.
        return torch.cat([lost.new_tensor([whole]), lost]).flip(0).cummax(0).values.flip(0)

    def _merged(self, counts: set[int]) -> tuple[dict[int, tuple[PairSlots, torch.Tensor]], list[float]]:
        """At each of these numbers of pairs the slots and which of them are left; and what each merging lost."""
        slots, cost = PairSlots(self.query_root, self.key_root, self.near), self.costs()
        alive, lost, found = list(range(len(cost))), [], {}
        for count in range(len(cost), min(counts) - 1, -1):
            if count in counts:
                found[count] = (slots.copy(), torch.tensor(alive))
            if count == min(counts):
                break
            t, s = divmod(int(cost.argmin()), len(cost))
            lost.append(float(cost[t, s]))
            alive.remove(s)
            cost[s], cost[:, s] = torch.inf, torch.inf
            slots.merge(t, s)
            others = torch.tensor([slot for slot in alive if slot != t], dtype=torch.int64)
            cost[t, others] = slots.cost(torch.tensor(t), others)
            cost[others, t] = slots.cost(others, torch.tensor(t))
        return found, lost

    def _fitted(self, slots: PairSlots, kept: torch.Tensor) -> MergedPairs:
        left, right = self._fit(slots, kept, ROUNDS)
        lost = self._energy(left, right, kept) / max(self._whole(), torch.finfo(torch.float64).tiny)
        left, right = _as_loud_as(self.query_root[..., kept], self.key_root[..., kept], left, right)
        queries, keys = (inverse(self.query_root) @ left).conj(), (inverse(self.key_root) @ right).conj()
        return MergedPairs(kept, queries, keys, lost)

    def _fit(self, slots: PairSlots, kept: torch.Tensor, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (heads, n/2, k) that lose no more of the scores than those given."""
        left, right = slots.left[..., kept], slots.right[..., kept]
        near = self.near[kept][:, kept]
        # What slot s would have to be, were it alone and of any rank.
        alone = [(self.query_root * self.near[p]) @ self.key_root for p in kept.tolist()]
        right, length = unit(right)
        left = left * length
        for _ in range(rounds):
            for s, wanted in enumerate(alone):
                others = near[s].clone()
                others[s] = 0
                residual = wanted - (left * others) @ right.mH
                reached = unit(residual @ right[..., s, None])[0]
                right[..., s, None] = unit(residual.mH @ reached)[0]
                left[..., s, None] = residual @ right[..., s, None]
        return left, right

    def _whole(self) -> float:
        """The energy of the dense scores."""
        none = self.query_root[..., :0]
        return self._energy(none, none, torch.zeros(0, dtype=torch.int64))

    def _energy(self, left: torch.Tensor, right: torch.Tensor, kept: torch.Tensor) -> float:
        """Of the difference between the dense scores and those of the slots."""
        places = torch.cat([torch.arange(len(self.near)), kept])
        left, right = torch.cat([self.query_root, -left], -1), torch.cat([self.key_root, right], -1)
        grams = (left.mH @ left) * (right.mH @ right).mT
        return float((self.near[places][:, places] * grams).sum().real.clamp_min(0))


def rotary_pairs(region: Region, statistics: RegionStatistics) -> RotaryPairs | None:
    """None where nothing rotates, where it is not known how, and where queries or keys say nothing."""
    if region.symmetry is not Symmetry.ROTARY_PAIRS or statistics.coherence is None:
        return None
    pairs = RotaryPairs(*score_moments(region, statistics), statistics.coherence)
    return pairs if float(pairs.energies().sum()) > 0 else None


def merged_map(region: Region, statistics: RegionStatistics, merged: MergedPairs) -> RegionMap:
    """As a map of the region, on the device of its statistics."""
    device = statistics.writer_weights[region.writers[0]].device
    down, key_down = (real_matrix(mixing).to(device) for mixing in (merged.queries, merged.keys))
    notes = {"scores lost": merged.lost}
    return RegionMap(down, key_down=key_down, pairs=merged.pairs.to(device), notes=notes)


def score_moments(region: Region, statistics: RegionStatistics) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moments of queries and keys, (heads, n, n) each; queries summed over those that share a KV head."""
    sides = []
    for keys in (False, True):
        gram = sum(
            (statistics.written_gram(name) for name in region.writers if (name in region.key_writers) is keys),
            torch.zeros((), dtype=torch.float64, device=statistics.gram.device),
        )
        groups = len(gram) // (region.heads * region.width)
        shape = (region.heads, groups, region.width)
        sides.append(torch.einsum("hgahgb->hab", gram.reshape(*shape, *shape)))
    return sides[0], sides[1]


def as_complex(moment: torch.Tensor) -> torch.Tensor:
    """E[z z*] (heads, n/2, n/2) complex128 of the pairs, from E[x x.T] (heads, n, n) float64 of their numbers."""
    (first, across), (back, last) = (rows.chunk(2, -1) for rows in moment.chunk(2, -2))
    return torch.complex(first + last, back - across)


def _between(places: list[int], values: list[float], last: int) -> list[float]:
    """At 1 to ``last``, on straight lines between ``values`` at ascending ``places``, the first of which is 1."""
    found = []
    for (start, before), (stop, after) in pairwise(zip(places, values, strict=True)):
        found += [before + (after - before) * i / (stop - start) for i in range(stop - start)]
    return [*found, values[-1]][:last]


def _as_loud_as(
    dense_left: torch.Tensor, dense_right: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same products, queries being to keys in size what they are in the dense pairs."""
    (left, loud), (right, other) = unit(left), unit(right)
    ratio = unit(dense_left)[1] / unit(dense_right)[1].clamp_min(torch.finfo(torch.float64).tiny)
    size = (loud * other).sqrt()
    return left * (size * ratio.sqrt()), right * (size / ratio.sqrt().clamp_min(torch.finfo(torch.float64).tiny))
