"""A linear that became two of a lower rank, as the report tells it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LowRankLinear:
    """``op``: its name in the graph; ``name``: its weight's; a weight (rows, columns) of this ``rank`` now.

    ``error``: ||slim - wanted|| / ||wanted|| of its output on held-out batches, None where there were none.
    """

    op: str
    name: str
    rows: int
    columns: int
    rank: int
    error: float | None = None
