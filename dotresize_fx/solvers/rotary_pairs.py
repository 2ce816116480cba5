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

import torch

from dotresize_fx.solvers.matrix_root import inverse, square_root

# Times that every slot is fitted to what the others leave: more changes little.
ROUNDS = 10


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
        """Keep ``count`` of the pairs, at least one."""
        left, right, alive, _ = self._merged(count)
        kept = torch.tensor(alive)
        left, right = self._fit(left[..., kept], right[..., kept], kept)
        whole = self._energy(left[..., :0], right[..., :0], kept[:0])
        lost = self._energy(left, right, kept) / max(whole, torch.finfo(torch.float64).tiny)
        left, right = _as_loud_as(self.query_root[..., kept], self.key_root[..., kept], left, right)
        queries, keys = (inverse(self.query_root) @ left).conj(), (inverse(self.key_root) @ right).conj()
        return MergedPairs(kept, queries, keys, lost)

    def curve(self) -> torch.Tensor:
        """(n/2 + 1,) float64: what merging alone loses at each number of pairs, in the moments' units; falling."""
        left, right, alive, lost = self._merged(1)
        last = (left[..., alive].abs().square().sum((1, 2)) * right[..., alive].abs().square().sum((1, 2))).sum()
        steps = torch.tensor([*lost, float(last)], dtype=torch.float64)
        return torch.cat([steps.cumsum(0).flip(0), steps.new_zeros(1)])

    # -- which pairs stay --------------------------------------------------------------------------

    def _merged(self, count: int) -> tuple[torch.Tensor, torch.Tensor, list[int], list[float]]:
        """Factors (heads, n/2, n/2), a column a slot; the slots that are left; and what each merging lost.

        Merging slot s into t keeps the leading singular value of B_t + G_ts B_s, so that it loses no more than
        dropping s does, and as much where the two turn so differently that G_ts is zero.
        """
        left, right = self.query_root.clone(), self.key_root.clone()
        grams = [side.mH @ side for side in (left, right)]
        every = torch.arange(len(self.near))
        cost = _cost(self.near, grams, every[:, None], every).fill_diagonal_(torch.inf)
        alive, lost = every.tolist(), []
        for _ in range(len(every) - count):
            place = int(cost.argmin())
            t, s = divmod(place, len(every))
            lost.append(float(cost[t, s]))
            alive.remove(s)
            cost[s], cost[:, s] = torch.inf, torch.inf
            left[..., t], right[..., t] = _leading(left[..., [t, s]], right[..., [t, s]], self.near[t, s])
            for gram, side in zip(grams, (left, right), strict=True):
                column = (side.mH @ side[..., t, None])[..., 0]
                gram[..., t], gram[:, t] = column, column.conj()
            others = torch.tensor([one for one in alive if one != t], dtype=torch.int64)
            merged = torch.tensor(t)
            cost[t, others] = _cost(self.near, grams, merged, others)
            cost[others, t] = _cost(self.near, grams, others, merged)
        return left, right, alive, lost

    # -- what they carry ---------------------------------------------------------------------------

    def _fit(
        self, left: torch.Tensor, right: torch.Tensor, kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (heads, n/2, k) that lose no more of the scores than those given."""
        near = self.near[kept][:, kept]
        # What slot s would have to be, were it alone and of any rank.
        alone = [(self.query_root * self.near[p]) @ self.key_root for p in kept.tolist()]
        right, length = _unit(right)
        left = left * length
        for _ in range(ROUNDS):
            for s, wanted in enumerate(alone):
                others = near[s].clone()
                others[s] = 0
                residual = wanted - (left * others) @ right.mH
                reached = _unit(residual @ right[..., s, None])[0]
                right[..., s, None] = _unit(residual.mH @ reached)[0]
                left[..., s, None] = residual @ right[..., s, None]
        return left, right

    def _energy(self, left: torch.Tensor, right: torch.Tensor, kept: torch.Tensor) -> float:
        """Of the difference between the dense scores and those of the slots."""
        places = torch.cat([torch.arange(len(self.near)), kept])
        left, right = torch.cat([self.query_root, -left], -1), torch.cat([self.key_root, right], -1)
        grams = (left.mH @ left) * (right.mH @ right).mT
        return float((self.near[places][:, places] * grams).sum().real.clamp_min(0))


def as_complex(moment: torch.Tensor) -> torch.Tensor:
    """E[z z*] (heads, n/2, n/2) complex128 of the pairs, from E[x x.T] (heads, n, n) float64 of their numbers."""
    half = moment.shape[-1] // 2
    (first, across), (back, last) = (rows.split(half, -1) for rows in moment.split(half, -2))
    return torch.complex(first + last, back - across)


def _cost(near: torch.Tensor, grams: list[torch.Tensor], t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """What merging slot s into slot t loses, summed over heads; t and s broadcast.

    ``grams`` are the inner products of the left and of the right factors. With X = B_t + G_ts B_s it is the square of
    X's second singular value, by its norm and determinant, and (1 - |G_ts|^2) ||B_s||^2 for what turns otherwise.
    """
    t, s = torch.broadcast_tensors(t, s)
    turned = near[t, s]
    share = turned.abs().square().clamp_max(1)
    own_t, own_s = ([gram[:, one, one].real for gram in grams] for one in (t, s))
    energy_t, energy_s = own_t[0] * own_t[1], own_s[0] * own_s[1]
    inner = grams[0][:, t, s] * grams[1][:, s, t]
    norm = (energy_t + share * energy_s + 2 * (turned * inner).real).clamp_min(0)
    areas = [
        (a * b - gram[:, t, s].abs().square()).clamp_min(0) for gram, a, b in zip(grams, own_t, own_s, strict=True)
    ]
    product = share * areas[0] * areas[1]
    first = norm / 2 + ((norm / 2).square() - product).clamp_min(0).sqrt()
    second = torch.where(first > 0, product / first, 0)
    return (second + (1 - share) * energy_s).sum(0)


def _leading(left: torch.Tensor, right: torch.Tensor, turned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best factors (heads, n/2) for u_t v_t^H + turned u_s v_s^H; left and right: (heads, n/2, 2), t first."""
    scale = torch.stack([torch.ones_like(turned), turned])
    left, inner_left = torch.linalg.qr(left * scale)
    right, inner_right = torch.linalg.qr(right)
    first, values, second = torch.linalg.svd(inner_left @ inner_right.mH)
    return (left @ first)[..., 0] * values[:, :1], (right @ second.mH)[..., 0]


def _unit(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of (..., n, k) of length one, and their lengths (..., 1, k); zero columns stay zero."""
    length = columns.norm(dim=-2, keepdim=True)
    return columns / length.clamp_min(torch.finfo(length.dtype).tiny), length


def _as_loud_as(
    dense_left: torch.Tensor, dense_right: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same products, queries being to keys in size what they are in the dense pairs."""
    (left, loud), (right, other) = _unit(left), _unit(right)
    ratio = _unit(dense_left)[1] / _unit(dense_right)[1].clamp_min(torch.finfo(torch.float64).tiny)
    size = (loud * other).sqrt()
    return left * (size * ratio.sqrt()), right * (size / ratio.sqrt().clamp_min(torch.finfo(torch.float64).tiny))
