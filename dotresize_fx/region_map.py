"""The maps that take a region's n dimensions to k, and random admissible and wrong ones for the ratio-0 proof."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from dotresize_fx.regions import ATTENTION_KINDS, Region, RegionKind, Symmetry
from dotresize_fx.rotary_map import real_matrix


@dataclass(frozen=True)
class RegionMap:
    """x_k = x_n @ down, and x_n is read back as x_k @ up.

    down: (n, k), folds into the writers. ``branch_down`` (n, k) stands in for it on the writers of a gate
    product's linear branch. up: (k, n), folds into the readers; None where ``reader_weights`` gives every reader's
    weight (out, k) outright, as a least-squares refit does. ``reader_biases`` go with them: a reader not named
    keeps its bias. All tensors are float64. ``notes`` are figures for the report.

    Where each KV head, or each expert, has a basis of its own, down is (heads, n, k) and up (heads, k, n); two
    dimensions are then one basis for all heads. ``key_down``, shaped like down, stands in for it on a region's
    ``key_writers``: the inverse transpose of down where queries and keys meet. A weight of ``reader_weights`` is as
    wide as all heads of its reader together. :func:`dotresize_fx.head_maps.over_heads` makes one matrix of such a map.

    ``pairs``, for ROTARY_PAIRS and there required: (k/2,) int64, the support. Numbers j and j + k/2 of the narrow head
    are turned by the cosines and sines of the dense head's pair ``pairs[j]``, in all heads alike. down and key_down
    then mix whole pairs, see :mod:`dotresize_fx.rotary_map`.
    """

    down: torch.Tensor
    up: torch.Tensor | None = None
    branch_down: torch.Tensor | None = None
    key_down: torch.Tensor | None = None
    pairs: torch.Tensor | None = None
    reader_weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    reader_biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    notes: Mapping[str, float | int | str] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """k."""
        return int(self.down.shape[-1])

    def down_of(self, region: Region, writer: str) -> torch.Tensor:
        """What folds into a writer of this name: ``down``, or what stands in for it there."""
        if self.key_down is not None and writer in region.key_writers:
            return self.key_down
        if self.branch_down is not None and writer in region.linear_branch:
            return self.branch_down
        return self.down

    def selected(self, region: Region) -> torch.Tensor | None:
        """(k,) int64: the neurons that an FFN's map takes as they are; None where it merges some."""
        if region.kind in ATTENTION_KINDS or self.branch_down is not None or self.down.ndim != 2:
            return None
        highest, kept = self.down.max(0)
        selects = ((self.down != 0).sum(0) == 1).all() & (highest == 1).all()
        return kept if bool(selects) else None


def selection(support: torch.Tensor, width: int) -> torch.Tensor:
    """The (width, k) matrix with a one where column j takes source ``support[j]``."""
    down = torch.zeros(width, len(support), dtype=torch.float64, device=support.device)
    down[support, torch.arange(len(support), device=support.device)] = 1.0
    return down


def random_admissible_map(region: Region, generator: torch.Generator) -> RegionMap:
    """A random full-rank map that must leave the function unchanged, of condition number at most 4.

    Orthogonal regions get a random rotation; permutation regions a random permutation, times scales between
    1/2 and 2 where the function lets them through (a gate's linear branch; ReLU, both positive). An attention's
    regions: see :func:`random_head_map`.
    """
    n = region.width
    if region.kind in ATTENTION_KINDS:
        return random_head_map(region, generator)
    if region.symmetry is Symmetry.ORTHOGONAL:
        rotation = random_rotation(n, generator)
        return RegionMap(rotation, rotation.T)
    if region.kind is RegionKind.EXPERTS:
        alone = replace(region, kind=RegionKind.FFN)
        return stacked([random_admissible_map(alone, generator) for _ in range(region.heads)])
    permutation = selection(torch.randperm(n, generator=generator), n)
    scale = random_scale(n, generator)
    if region.linear_branch:
        signs = 2.0 * torch.randint(0, 2, (n,), generator=generator) - 1
        scaled = permutation * (scale * signs)
        return RegionMap(permutation, (permutation / (scale * signs)).T, branch_down=scaled)
    if region.positive_scale:
        return RegionMap(permutation * scale, (permutation / scale).T)
    return RegionMap(permutation, permutation.T)


def random_wrong_map(region: Region, generator: torch.Generator) -> RegionMap:
    """An invertible, equally well-conditioned map that the region's symmetry does not admit.

    A rotation where only permutations pass, an uneven scaling where only rotations do: if the function does not
    notice, the ratio-0 proof proves nothing. An attention's regions: see :func:`wrong_head_map`.
    """
    n = region.width
    if region.kind in ATTENTION_KINDS:
        return wrong_head_map(region, generator)
    if region.symmetry is Symmetry.ORTHOGONAL:
        scale = random_scale(n, generator)
        return RegionMap(torch.diag(scale), torch.diag(1 / scale))
    if region.kind is RegionKind.EXPERTS:
        turns = [random_rotation(n, generator) for _ in range(region.heads)]
        return stacked([RegionMap(turn, turn.T) for turn in turns])
    rotation = random_rotation(n, generator)
    return RegionMap(rotation, rotation.T)


def stacked(maps: Sequence[RegionMap]) -> RegionMap:
    """One map of maps (n, k), one an expert or KV head; none of them gives readers' weights."""
    parts = {name: [getattr(one, name) for one in maps] for name in ("down", "up", "branch_down")}
    found = {name: None if part[0] is None else torch.stack(part) for name, part in parts.items()}
    assert found["down"] is not None
    return RegionMap(found["down"], found["up"], branch_down=found["branch_down"])


def random_head_map(region: Region, generator: torch.Generator) -> RegionMap:
    """A random admissible map of full width for a region of an attention, of condition number at most 4.

    HEADWISE_LINEAR: per KV head a rotation times scales. ROTARY_PAIRS: the pairs in another order, in each KV head
    turned by a phase and scaled by r on queries and 1/r on keys. HEADS: the KV heads in another order. Values behind a
    gate: the numbers of each KV head in another order, times scales on the values.
    """
    n = region.width
    if region.kind is RegionKind.HEADS:
        order = selection(_another_order(n, generator), n)
        return RegionMap(order, order.T)
    if region.symmetry is Symmetry.ROTARY_PAIRS:
        pairs = _another_order(n // 2, generator)
        shape = (region.heads, 1, n // 2)
        scale = random_scale(region.heads * n // 2, generator).view(shape)
        phase = torch.polar(torch.ones_like(scale), 2 * math.pi * torch.rand(shape, generator=generator).double())
        mixing = selection(pairs, n // 2) * phase
        return RegionMap(real_matrix(mixing * scale), key_down=real_matrix(mixing / scale), pairs=pairs)
    if region.symmetry is Symmetry.PERMUTATION:
        alone = replace(region, kind=RegionKind.FFN)
        return stacked([random_admissible_map(alone, generator) for _ in range(region.heads)])
    turns = torch.stack([random_rotation(n, generator) for _ in range(region.heads)])
    scales = torch.stack([random_scale(n, generator) for _ in range(region.heads)])[:, None]
    down, inverse = turns * scales, (turns / scales).mT
    if region.kind is RegionKind.VALUE:
        return RegionMap(down, inverse)
    return RegionMap(down, key_down=inverse.mT)


def wrong_head_map(region: Region, generator: torch.Generator) -> RegionMap:
    """An invertible map that a region of an attention does not admit.

    HEADWISE_LINEAR: a rotation across KV heads, as (heads, n, heads, n); of a single KV head every basis is
    admissible, there the map is not undone. Values behind a gate: a rotation a KV head. ROTARY_PAIRS: pairs of all
    frequencies mixed by a unitary matrix per KV head, which the keys undo; of a single pair a phase that they do not.
    HEADS: the KV heads in another order, but for the keys.
    """
    n, heads = region.width, region.heads
    if region.kind is RegionKind.HEADS:
        order = selection(_another_order(n, generator), n)
        return RegionMap(order, order.T, key_down=torch.eye(n, dtype=torch.float64))
    if region.symmetry is Symmetry.ROTARY_PAIRS:
        pairs = torch.arange(n // 2)
        if n == 2:
            turn = torch.full((1, 1), 1j, dtype=torch.complex128)
            return RegionMap(real_matrix(turn), key_down=torch.eye(n, dtype=torch.float64), pairs=pairs)
        gaussian = torch.randn(heads, n // 2, n // 2, generator=generator, dtype=torch.complex128)
        mixed = real_matrix(torch.linalg.qr(gaussian).Q)
        return RegionMap(mixed, key_down=mixed, pairs=pairs)
    if region.symmetry is Symmetry.PERMUTATION:
        turns = torch.stack([random_rotation(n, generator) for _ in range(heads)])
        return RegionMap(turns, turns.mT)
    across = random_rotation(heads * n, generator)
    back = across.T if heads > 1 else across
    down, up = across.view(heads, n, heads, n), back.reshape(heads, n, heads, n)
    return RegionMap(down, up) if region.kind is RegionKind.VALUE else RegionMap(down, key_down=back.T.view_as(down))


def pair_selection(pairs: torch.Tensor, width: int) -> RegionMap:
    """Takes the rotary pairs (p, p + width/2) of ``pairs`` (k,) int64, in that order, and mixes none."""
    return RegionMap(selection(torch.cat([pairs, pairs + width // 2]), width), pairs=pairs)


def _another_order(n: int, generator: torch.Generator) -> torch.Tensor:
    """A random permutation of n that is not the identity, where there is one."""
    order = torch.randperm(n, generator=generator)
    return order.roll(1) if torch.equal(order, torch.arange(n)) else order


def random_scale(n: int, generator: torch.Generator) -> torch.Tensor:
    """Random factors between 1/2 and 2, (n,) float64."""
    return 2.0 ** (2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1)


def random_rotation(n: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthogonal (n, n) float64 matrix, Haar-distributed up to signs (QR of a Gaussian)."""
    gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64)
    rotation: torch.Tensor = torch.linalg.qr(gaussian).Q
    return rotation
