"""A block that left a model, as the report tells it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile

from dotresize_fx.graph import Graph


@dataclass(frozen=True)
class GoneBlock:
    """``number``: counted from 0 in the dense model. ``name``: what the names of its weights have in common, empty
    where that is nothing. ``ops``: of the dense graph. Merged ``into`` the block of that number, in whose weights it is
    a share ``alpha``; None each where it was dropped.
    """

    number: int
    name: str
    ops: frozenset[str]
    into: int | None = None
    alpha: float | None = None


def gone_block(
    graph: Graph, number: int, ops: Collection[str], into: int | None = None, alpha: float | None = None
) -> GoneBlock:
    """The block of these ``ops`` of the dense ``graph``."""
    values = [value for name in ops for value in (graph.op(name).weight, graph.op(name).bias)]
    names = [graph.parameter_name(value) for value in values if value is not None and value.is_parameter]
    return GoneBlock(number, _shared(names), frozenset(ops), into, alpha)


def _shared(names: Sequence[str]) -> str:
    """The parts between dots that all names begin with; a name alone has no such."""
    columns = zip(*(name.split(".") for name in names), strict=False) if len(names) > 1 else ()
    return ".".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))
