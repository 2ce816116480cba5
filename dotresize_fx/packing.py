"""How the parameters of a linear that a graph sees as several stand in the model's own one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packing:
    """``parts`` are names of parameters whose rows the stored one holds: all of the first, then all of the next, or,
    with several ``groups``, of each part its first share, then of each its second. 0 groups are as many as rows.
    """

    parts: tuple[str, ...]
    groups: int = 1

    def join(self, parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        """The stored tensor of the parts' ones, rows being along ``axis``.

        Raises:
            ValueError: the groups do not divide the parts' rows, or by turns the parts differ in rows.
        """
        groups = self.groups or parts[0].shape[axis]
        if any(part.shape[axis] % groups for part in parts):
            raise ValueError(f"{[part.shape[axis] for part in parts]} rows do not make {groups} groups")
        shares = [torch.unflatten(part, axis, (groups, part.shape[axis] // groups)) for part in parts]
        inner = axis if axis < 0 else axis + 1
        joined: torch.Tensor = torch.cat(shares, inner).flatten(inner - 1, inner)
        return joined
