"""Regions: the widths of a graph, who writes and reads each, and which changes of basis it allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from dotresize_fx.head_layout import HeadLayout


class Symmetry(StrEnum):
    """The exact changes of basis that what stands between writers and readers lets through."""

    GENERAL_LINEAR = "general linear"
    ORTHOGONAL = "orthogonal"
    PERMUTATION = "permutation"
    HEADWISE_LINEAR = "general linear per KV head"  # query heads that share a KV head share its basis
    ROTARY_PAIRS = "permutation of rotary pairs"  # one order for all heads, phase and scale per KV head


class RegionKind(StrEnum):
    """What a region is in a transformer; decided by what stands between, never by a name."""

    FFN = "ffn"
    EXPERTS = "experts"  # the width of a mixture's experts, the same for all of them
    RESIDUAL = "residual"
    PLAIN = "plain"  # only linear ops between; nothing cuts it yet
    VALUE = "value"  # the width of a value head
    QUERY_KEY = "query_key"  # the width of a query and key head
    HEADS = "kv_heads"  # whole KV heads, with the query heads that share them


ATTENTION_KINDS = (RegionKind.VALUE, RegionKind.QUERY_KEY, RegionKind.HEADS)


@dataclass(frozen=True)
class Region:
    """One coupled dimension of size ``width``.

    ``writers`` and ``readers`` are op names in topological order; a writer's output and a reader's input have the
    region's dimension. ``normed_readers`` are those readers that read through one of ``norms``.
    ``linear_branch`` are the writers of a gate product's linear branch: any non-zero scale passes there. A VALUE region
    whose mixed values a gate multiplies number by number is a PERMUTATION of each KV head's numbers, the gate a writer.
    ``positive_scale`` says that the nonlinearity is ReLU, through which positive scales pass.
    ``target`` is the value that the sublayer's readers finally add up to (the residual stream after the sublayer),
    or the reader's own output where nothing is added. ``crossed`` are the names of the ops between, ``tables`` those of
    parameters (..., width) that they read as they are; where norms keep their gains (PERMUTATION) these are among them.
    ``places`` are the names of those values and tables whose last axis the dimension is not, with the axis, counted
    from the end. ``limit`` is why permutations alone pass where norms or sums let one expect more.

    Regions of an attention (``ATTENTION_KINDS``) have the rest. ``width`` is the size of one head, for HEADS the
    number of KV heads. ``heads`` is the number of KV heads; of EXPERTS that of experts, each with a basis of its own.
    ``attention`` names the attention op, ``attention_reader`` the linear that reads what it mixed (the target leads
    from there; a QUERY_KEY region has no readers of its own). ``key_writers`` are those writers that write keys.
    ``layout`` says where the ops between state the region's size. Regions of one attention share weights: after
    cutting HEADS, find the others anew.
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
    tables: tuple[str, ...] = ()
    places: tuple[tuple[str, int], ...] = ()
    limit: str = ""
    heads: int = 1
    attention: str = ""
    attention_reader: str = ""
    key_writers: tuple[str, ...] = ()
    layout: HeadLayout | None = None

    @property
    def keeps_apart(self) -> bool:
        """Whether an op between treats each number in its own way, so that none may be merged with another."""
        return bool(self.tables or self.limit)

    @property
    def description(self) -> str:
        """One phrase for people."""
        parts = [counted(self.heads, "KV head")] if self.kind in (RegionKind.VALUE, RegionKind.QUERY_KEY) else []
        parts += [counted(len(self.writers), "writer")]
        parts += [counted(len(self.readers), "reader")] if self.kind is not RegionKind.QUERY_KEY else []
        parts += [f"{counted(len(self.norms), 'norm')} between"] if self.norms else []
        return f"{self.kind} width {self.width}: {', '.join(parts)}"


def counted(number: int, noun: str) -> str:
    """ "1 writer", "2 writers"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


SEPARATOR = ", "  # between the names of several regions


@dataclass(frozen=True)
class LinearMatch:
    """What became of one linear. ``reads`` and ``writes`` name its regions; a reason stands where there is none.

    An attention's linear takes part in several regions on one side: their names are joined with ``SEPARATOR``.
    """

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
    """All regions of a graph, and every linear with its regions or the reason why it has none.

    ``refused`` are widths of an attention that are no region while others of the same attention are: pairs of what
    and why. No linear's reason tells of those.
    """

    regions: tuple[Region, ...]
    linears: tuple[LinearMatch, ...]
    refused: tuple[tuple[str, str], ...] = ()

    def of_kind(self, *kinds: str) -> Iterator[Region]:
        """The regions of these kinds, in topological order."""
        return (region for region in self.regions if region.kind in kinds)
