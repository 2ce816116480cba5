"""A table of words that terminal and page can print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """The first column is of names, the others of figures."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    detail: str = ""
