"""Matches and what became of them, as rows of the report."""

from __future__ import annotations

from collections.abc import Sequence

from dotresize_fx.regions import SEPARATOR, MatchReport
from dotresize_fx.report.contents import LinearRole, LinearRow, RegionRow
from dotresize_fx.sweep import SweptRegion


def region_rows(matches: MatchReport, swept: Sequence[SweptRegion]) -> tuple[RegionRow, ...]:
    """What was found, and what became of it."""
    cut = {entry.region.name: entry for entry in swept}
    names = {row.op: row.parameter.removesuffix(".weight") for row in matches.linears}
    rows = []
    known = {region.name for region in matches.regions}
    parted = [entry.region for entry in swept if entry.region.name not in known]  # a post-norm stream
    for region in (*matches.regions, *parted):
        entry = cut.get(region.name)
        rows.append(
            RegionRow(
                name=region.name,
                kind=region.kind.value,
                symmetry=region.symmetry.value,
                width_before=region.width,
                width_after=entry.width if entry else region.width,
                writers=tuple(names.get(op, op) for op in region.writers),
                readers=tuple(names.get(op, op) for op in region.readers),
                method=entry.method if entry else None,
                error=entry.error if entry else None,
                notes=dict(entry.notes) if entry else {},
            )
        )
    return tuple(rows)


def linear_rows(matches: MatchReport) -> tuple[LinearRow, ...]:
    """The match table."""
    rows = []
    for match in matches.linears:
        roles = []
        if match.reads is not None:
            roles += [LinearRole(region=name, role="reader") for name in match.reads.split(SEPARATOR)]
        if match.writes is not None:
            roles += [LinearRole(region=name, role="writer") for name in match.writes.split(SEPARATOR)]
        name = match.parameter.removesuffix(".weight")
        rows.append(LinearRow(name=name, shape=match.shape, roles=tuple(roles), reason=match.reason))
    return tuple(rows)
