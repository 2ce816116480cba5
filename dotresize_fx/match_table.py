"""The match report as text: regions, then every linear with its part in them or the reason it has none."""

from __future__ import annotations

from collections.abc import Mapping

from dotresize_fx.regions import MatchReport, counted


def match_table(matches: MatchReport, left_alone: Mapping[str, str]) -> str:
    """Both lists and, under them, the reasons: many linears share one, so the lines carry its number only.

    Widths of an attention that are none of its regions stand behind the regions.

    ``left_alone`` maps names of matched regions that cannot be cut to the reason.
    """
    reasons: dict[str, int] = {}

    def part(region: str | None, reason: str) -> str:
        return region or f"({reasons.setdefault(reason, len(reasons) + 1)})"

    lines = [counted(len(matches.regions), "region") + ": width, who shares it, changes of basis that it allows"]
    for region in matches.regions:
        why = left_alone.get(region.name, "")
        lines.append(
            f"  {region.name}: {region.description}; {region.symmetry}"
            + (f"; left alone {part(None, why)}" if why else "")
        )
    lines += [f"  {what}: none {part(None, why)}" for what, why in matches.refused]
    matched = sum(row.matched for row in matches.linears)
    lines += ["", f"{counted(len(matches.linears), 'linear')}, {matched} matched"]
    rows = [("weight", "out x in", "reads", "writes")]
    rows += [
        (
            row.parameter,
            f"{row.shape[0]} x {row.shape[1]}",
            part(row.reads, row.reads_reason),
            part(row.writes, row.writes_reason),
        )
        for row in matches.linears
    ]
    weight, shape, reads = (max(len(row[column]) for row in rows) for column in range(3))
    lines += [f"  {row[0]:<{weight}}  {row[1]:>{shape}}  {row[2]:<{reads}}  {row[3]}" for row in rows]
    if reasons:
        lines += ["", "left alone because"]
        lines += [f"  ({number}) {reason}" for reason, number in reasons.items()]
    return "\n".join(lines)
