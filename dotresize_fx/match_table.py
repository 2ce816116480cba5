"""The match report as text: regions, then every linear with its part in them or the reason it has none."""

from __future__ import annotations

from collections.abc import Mapping

from dotresize_fx.regions import MatchReport


def match_table(matches: MatchReport, left_alone: Mapping[str, str]) -> str:
    """``left_alone`` maps names of matched regions that cannot be cut to the reason."""
    lines = [f"{len(matches.regions)} regions"]
    for region in matches.regions:
        why = left_alone.get(region.name, "")
        lines.append(
            f"  {region.name}: {region.description}; {region.symmetry}" + (f"; left alone: {why}" if why else "")
        )
    matched = sum(row.matched for row in matches.linears)
    lines += ["", f"{len(matches.linears)} linears, {matched} matched"]
    width = max((len(row.parameter) for row in matches.linears), default=0)
    for row in matches.linears:
        roles = [f"reads {row.reads}"] if row.reads else []
        roles += [f"writes {row.writes}"] if row.writes else []
        shape = f"{row.shape[0]} x {row.shape[1]}"
        lines.append(f"  {row.parameter:<{width}}  {shape:>13}  {'; '.join(filter(None, (*roles, row.reason)))}")
    return "\n".join(lines)
