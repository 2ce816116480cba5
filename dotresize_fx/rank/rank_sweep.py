"""One walk over the linears: each is solved for on what the already reduced ones before it feed it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dotresize_fx.errors import SolverError
from dotresize_fx.gram import GramAccumulator
from dotresize_fx.graph import Graph
from dotresize_fx.least_squares import relative_error
from dotresize_fx.rank.factors import Factors, solve_reduced_rank, solve_rom


@dataclass(frozen=True)
class RankCut:
    """A linear, by op name, and the rank it is to have. ``target``: the state of the stream that it adds to, if any."""

    op: str
    rank: int
    target: str = ""


@dataclass(frozen=True)
class RankSolution:
    """``error`` is ||found - wanted|| / ||wanted|| of the linear's output on batches that were not solved with."""

    factors: Factors
    error: float | None


class RankSums(Protocol):
    """What is summed over the calibration data for a linear; each form of a graph runs in its own way.

    What a linear should put out (``wanted``) is the dense model's, of one that adds to the stream what makes the stream
    the dense model's again; without dense targets its own output.
    """

    def reach(self, source: str) -> None:
        """Bring the streams to where this value is there and nothing that reads it was run."""

    def gather(self, cut: RankCut) -> tuple[GramAccumulator, GramAccumulator]:
        """Over what the linear reads, a constant one beside it: what is solved with, ``cross["missing"]`` being what is
        wanted beyond the linear's own output; and what is held out, with ``cross["wanted"]``.
        """

    def edited(self) -> None:
        """A weight of the slim graph is another one now."""


class RankSweep:
    """Solves for the factors of a graph's linears and gives each the product for its weight; no op is added.

    ``graph`` is a copy of the dense one in which linears that are to take a bias have one, ``sums`` are over it.
    ``published``: as the paper has it.
    """

    def __init__(self, graph: Graph, sums: RankSums, *, published: bool = False) -> None:
        self.graph, self.sums, self.published = graph, sums, published

    def solve(self, cuts: Sequence[RankCut], advanced: Callable[[], None] = lambda: None) -> dict[str, RankSolution]:
        """By op name; the cuts may come in any order. ``advanced`` is called once a cut."""
        groups: dict[str, list[RankCut]] = {}
        positions = self.graph.positions
        for cut in sorted(cuts, key=lambda one: positions[one.op]):
            groups.setdefault(self.graph.op(cut.op).inputs[0].name, []).append(cut)
        found = {}
        for source, together in groups.items():
            self.sums.reach(source)
            for cut in together:
                found[cut.op] = self._solve(cut)
                advanced()
        return found

    def _solve(self, cut: RankCut) -> RankSolution:
        op = self.graph.op(cut.op)
        weight, bias = self.graph.weight(op), self.graph.bias(op)
        fitting, held_out = self.sums.gather(cut)
        if not fitting.gram.isfinite().all():
            raise SolverError(f"{cut.op}: what it reads on the calibration data is infinite or NaN")
        if self.published:
            factors = solve_rom(weight, bias, fitting, cut.rank)
        else:
            factors = solve_reduced_rank(weight, bias, fitting, cut.rank)
        error = None
        if held_out.tokens:
            shift = factors.product.new_zeros(len(weight)) if factors.bias is None else factors.bias
            error = relative_error(held_out, "wanted", torch.cat([factors.product, shift[:, None]], 1)) ** 0.5
        self.graph.set_weight(op, factors.product.to(weight.dtype))
        if factors.bias is not None:
            self.graph.set_bias(self.graph.op(cut.op), factors.bias.to(weight.dtype))
        self.sums.edited()
        return RankSolution(factors, error)
