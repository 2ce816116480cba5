"""How the dense model's residual stream is seen in the coordinates of one that was cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from dotresize_fx.regions import Region


@dataclass(frozen=True)
class SlimStream:
    """``bases``: (d, k) by the name of an op whose output is the stream there; it takes the dense stream, mean and all,
    into the slim one's coordinates. ``readers`` are the linears that read the stream, ``normed`` those that do behind a
    norm.
    """

    bases: Mapping[str, torch.Tensor]
    readers: frozenset[str] = frozenset()
    normed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, cut: Iterable[tuple[Region, torch.Tensor]]) -> SlimStream:
        """Of each stream that was cut and its basis."""
        pairs = list(cut)
        return cls(
            {name: basis for region, basis in pairs for name in (*region.crossed, *region.writers)},
            frozenset(name for region, _ in pairs for name in region.readers),
            frozenset(name for region, _ in pairs for name in region.normed_readers),
        )

    def project(self, target: str, value: torch.Tensor) -> torch.Tensor:
        """The dense stream (..., d) that the op ``target`` puts out as (..., k); anything else as it is."""
        basis = self.bases.get(target)
        return value if basis is None else value @ basis.to(value)
