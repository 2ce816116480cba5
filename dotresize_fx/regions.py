"""Regions: the widths of a graph, who writes and reads each, and which changes of basis it allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Symmetry(StrEnum):
    """The exact changes of basis that what stands between writers and readers lets through."""

    GENERAL_LINEAR = "general linear"
    ORTHOGONAL = "orthogonal"
    PERMUTATION = "permutation"


class RegionKind(StrEnum):
    """What a region is in a transformer; decided by what stands between, never by a name."""

    FFN = "ffn"
    RESIDUAL = "residual"
    PLAIN = "plain"  # only linear ops between; nothing cuts it yet


@dataclass(frozen=True)
class Region:
    """One coupled dimension of size ``width``.

    ``writers`` and ``readers`` are op names in topological order; a writer's output and a reader's input have the
    region's dimension. ``normed_readers`` are those readers that read through one of ``norms``.
    ``linear_branch`` are the writers of a gate product's linear branch: any non-zero scale passes there.
    ``positive_scale`` says that the nonlinearity is ReLU, through which positive scales pass.
    ``target`` is the value that the sublayer's readers finally add up to (the residual stream after the sublayer),
    or the reader's own output where nothing is added. ``crossed`` are the names of the ops between.
    """

    name: str
    kind: RegionKind
    symmetry: Symmetry
    width: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    norms: tuple[str, ...] = ()
    normed_readers: tuple[str, ...] = ()
    linear_branch: tuple[str, ...] = ()
    positive_scale: bool = False
    target: str = ""
    crossed: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """One phrase for people."""
        parts = [counted(len(self.writers), "writer"), counted(len(self.readers), "reader")]
        parts += [f"{counted(len(self.norms), 'norm')} between"] if self.norms else []
        return f"{self.kind} width {self.width}: {', '.join(parts)}"


def counted(number: int, noun: str) -> str:
    """ "1 writer", "2 writers"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass(frozen=True)
class LinearMatch:
    """What became of one linear. ``reads`` and ``writes`` name its regions; a reason stands where there is none."""

    op: str
    parameter: str
    shape: tuple[int, int]
    reads: str | None
    writes: str | None
    reads_reason: str = ""
    writes_reason: str = ""

    @property
    def matched(self) -> bool:
        """Whether either of its dimensions belongs to a region."""
        return self.reads is not None or self.writes is not None

    @property
    def reason(self) -> str:
        """Why a dimension was left alone, in words; empty when both are matched."""
        parts = []
        if self.reads is None:
            parts.append(f"input: {self.reads_reason}")
        if self.writes is None:
            parts.append(f"output: {self.writes_reason}")
        return "; ".join(parts)


@dataclass(frozen=True)
class MatchReport:
    """All regions of a graph, and every linear with its regions or the reason why it has none."""

    regions: tuple[Region, ...]
    linears: tuple[LinearMatch, ...]

    def of_kind(self, *kinds: str) -> Iterator[Region]:
        """The regions of these kinds, in topological order."""
        return (region for region in self.regions if region.kind in kinds)
