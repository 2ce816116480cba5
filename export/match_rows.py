"""Matches and what became of them, as rows of the report."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dotresize_fx.depth.gone_block import GoneBlock
from dotresize_fx.rank.low_rank_linear import LowRankLinear
from dotresize_fx.regions import SEPARATOR, MatchReport
from dotresize_fx.report.contents import BlockRow, LinearRole, LinearRow, RankRow, RegionRow
from dotresize_fx.sweep import SweptRegion

WENT = "its block went"


def region_rows(
    matches: MatchReport, swept: Sequence[SweptRegion], gone: Collection[str] = ()
) -> tuple[RegionRow, ...]:
    """What was found, and what became of it; ``gone`` are ops that are there no more, nor regions that had no other."""
    cut = {entry.region.name: entry for entry in swept}
    names = {row.op: row.parameter.removesuffix(".weight") for row in matches.linears}
    rows = []
    known = {region.name for region in matches.regions}
    parted = [entry.region for entry in swept if entry.region.name not in known]  # a post-norm stream
    for region in (*matches.regions, *parted):
        writers, readers = ([op for op in ops if op not in gone] for ops in (region.writers, region.readers))
        if not (writers or readers) and (region.writers or region.readers):
            continue
        entry = cut.get(region.name)
        rows.append(
            RegionRow(
                name=region.name,
                kind=region.kind.value,
                symmetry=region.symmetry.value,
                width_before=region.width,
                width_after=entry.width if entry else region.width,
                writers=tuple(names.get(op, op) for op in writers),
                readers=tuple(names.get(op, op) for op in readers),
                method=entry.method if entry else None,
                error=entry.error if entry else None,
                notes=dict(entry.notes) if entry else {},
            )
        )
    return tuple(rows)


def linear_rows(matches: MatchReport, gone: Collection[str] = ()) -> tuple[LinearRow, ...]:
    """The match table; those ``gone`` have no role any more."""
    rows = []
    for match in matches.linears:
        roles = []
        if match.reads is not None:
            roles += [LinearRole(region=name, role="reader") for name in match.reads.split(SEPARATOR)]
        if match.writes is not None:
            roles += [LinearRole(region=name, role="writer") for name in match.writes.split(SEPARATOR)]
        name = match.parameter.removesuffix(".weight")
        if match.op in gone:
            rows.append(LinearRow(name=name, shape=match.shape, reason=WENT))
        else:
            rows.append(LinearRow(name=name, shape=match.shape, roles=tuple(roles), reason=match.reason))
    return tuple(rows)


def block_rows(gone: Sequence[GoneBlock]) -> tuple[BlockRow, ...]:
    """In the dense model's order."""
    return tuple(
        BlockRow(index=block.number, name=block.name, merged_into=block.into, alpha=block.alpha)
        for block in sorted(gone, key=lambda one: one.number)
    )


def rank_rows(linears: Sequence[LowRankLinear]) -> tuple[RankRow, ...]:
    """In the order of the linears."""
    return tuple(
        RankRow(name=one.name, d_in=one.columns, d_out=one.rows, rank=one.rank, error=one.error) for one in linears
    )
