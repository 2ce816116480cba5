"""Slots of a narrow head of rotary pairs, as rank-one terms in whitened factors; see rotary_pairs.py."""

from __future__ import annotations

import torch


class PairSlots:
    """Slots that start as the dense pairs: B_s = left_s right_s^H of columns of (heads, n/2, n/2)."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor, near: torch.Tensor) -> None:
        self.left, self.right, self.near = left.clone(), right.clone(), near
        self.grams = [side.mH @ side for side in (left, right)]

    def copy(self) -> PairSlots:
        return PairSlots(self.left, self.right, self.near)

    def merge(self, t: int, s: int) -> None:
        """Slot t takes s over: the leading singular value of B_t + G_ts B_s. Nothing may be asked of s from then on."""
        merged = _leading(self.left[..., [t, s]], self.right[..., [t, s]], self.near[t, s])
        self.left[..., t], self.right[..., t] = merged
        for gram, side in zip(self.grams, (self.left, self.right), strict=True):
            column = (side.mH @ side[..., t, None])[..., 0]
            gram[..., t], gram[:, t] = column, column.conj()

    def cost(self, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """What merging slot s into slot t loses, summed over heads; t and s broadcast.

        With X = B_t + G_ts B_s it is the square of X's second singular value, by its norm and determinant, and
        (1 - |G_ts|^2) ||B_s||^2 for what turns otherwise. It is never more than dropping s loses, and no less where
        G_ts is zero.
        """
        t, s = torch.broadcast_tensors(t, s)  # type: ignore[no-untyped-call]
        turned = self.near[t, s]
        share = turned.abs().square().clamp_max(1)
        own = [[gram[:, slot, slot].real for slot in (t, s)] for gram in self.grams]
        energy_t, energy_s = (own[0][i] * own[1][i] for i in (0, 1))
        inner = self.grams[0][:, t, s] * self.grams[1][:, s, t]
        norm = (energy_t + share * energy_s + 2 * (turned * inner).real).clamp_min(0)
        areas = [
            (a * b - gram[:, t, s].abs().square()).clamp_min(0) for gram, (a, b) in zip(self.grams, own, strict=True)
        ]
        product = share * areas[0] * areas[1]
        first = norm / 2 + ((norm / 2).square() - product).clamp_min(0).sqrt()
        second = torch.where(first > 0, product / first, 0)
        return (second + (1 - share) * energy_s).sum(0)


def energies(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(slots,): the squared norm of each left_s right_s^H, summed over heads."""
    sides = (side.abs().square().sum(1) for side in (left, right))
    return torch.stack(list(sides)).prod(0).sum(0)


def _leading(left: torch.Tensor, right: torch.Tensor, turned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best factors (heads, n/2) for u_t v_t^H + turned u_s v_s^H; left and right: (heads, n/2, 2), t first."""
    scale = torch.stack([torch.ones_like(turned), turned])
    left, inner_left = torch.linalg.qr(left * scale)
    right, inner_right = torch.linalg.qr(right)
    first, values, second = torch.linalg.svd(inner_left @ inner_right.mH)
    return (left @ first)[..., 0] * values[:, :1], (right @ second.mH)[..., 0]


def unit(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of (..., n, k) of length one, and their lengths (..., 1, k); zero columns stay zero."""
    length = columns.norm(dim=-2, keepdim=True)
    return columns / length.clamp_min(torch.finfo(length.dtype).tiny), length
