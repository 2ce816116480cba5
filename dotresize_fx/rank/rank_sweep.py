"""One walk over the linears: each is solved for on what the already reduced ones before it feed it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dotresize_fx.activation_stream import ActivationStream
from dotresize_fx.errors import SolverError
from dotresize_fx.fidelity import Inputs
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import GramAccumulator, padding_mask, token_rows, with_ones
from dotresize_fx.least_squares import relative_error
from dotresize_fx.rank.factors import Factors, solve_reduced_rank, solve_rom
from dotresize_fx.sweep import is_held_out


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


class RankSweep:
    """Solves for the factors of a graph's linears and gives each the product for its weight; no op is added.

    ``slim`` is a copy of ``dense`` in which linears that are to take a bias have one. ``published``: as the paper has
    it; otherwise what a linear should put out is the dense model's, of one that adds to the stream what makes the
    stream the dense model's again (``dense_targets``; else its own output). ``sequential`` False calibrates all on the
    dense model.
    """

    def __init__(
        self,
        dense: FxGraph,
        slim: FxGraph,
        batches: Sequence[Inputs],
        *,
        published: bool = False,
        dense_targets: bool = True,
        sequential: bool = True,
    ) -> None:
        self.graph, self.dense_graph = slim, dense
        self.published, self.dense_targets = published, dense_targets and not published
        self.masks = [padding_mask(batch) for batch in batches]
        self.dense, self.slim = (
            ActivationStream(execution := Execution(graph), [execution.start(batch) for batch in batches])
            for graph in (dense, slim if sequential else dense)
        )

    def solve(self, cuts: Sequence[RankCut], advanced: Callable[[], None] = lambda: None) -> dict[str, RankSolution]:
        """By op name; the cuts may come in any order. ``advanced`` is called once a cut."""
        groups: dict[str, list[RankCut]] = {}
        for cut in sorted(cuts, key=lambda one: self.graph.positions[one.op]):
            groups.setdefault(self.graph.op(cut.op).inputs[0].name, []).append(cut)
        found = {}
        for source, together in groups.items():
            for stream in (self.slim, self.dense) if self.dense_targets else (self.slim,):
                position = stream.execution.position(stream.execution.graph.node(source))
                stream.advance(max(stream.position, position + 1))
            for cut in together:
                found[cut.op] = self._solve(cut, source)
                advanced()
        return found

    def _solve(self, cut: RankCut, source: str) -> RankSolution:
        op = self.graph.op(cut.op)
        weight, bias = self.graph.weight(op), self.graph.bias(op)
        fitting, held_out = GramAccumulator(), GramAccumulator()
        for i, (x, wanted) in enumerate(zip(self._read(source), self._wanted(cut, source), strict=True)):
            rows, wanted = with_ones(token_rows(x, self.masks[i])), token_rows(wanted, self.masks[i])
            if is_held_out(i):
                held_out.add(rows, wanted=wanted)
            else:
                fitting.add(rows, missing=wanted - self._applied(self.graph, cut.op, rows[:, :-1]))
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
        return RankSolution(factors, error)

    def _read(self, source: str) -> list[torch.Tensor]:
        node = self.slim.execution.graph.node(source)
        return [environment[node] for environment in self.slim.environments]

    def _wanted(self, cut: RankCut, source: str) -> list[torch.Tensor]:
        """Per batch what the linear should put out."""
        if not self.dense_targets:
            return [self._applied(self.graph, cut.op, x) for x in self._read(source)]
        if cut.target:
            goals, found = self._ahead(self.dense, [cut.target]), self._ahead(self.slim, [cut.target, cut.op])
            # Some models run a sublayer with batch and length joined and part them behind the addition.
            return [(goal - state).reshape_as(out) + out for (goal,), (state, out) in zip(goals, found, strict=True)]
        node = self.dense_graph.node(self.dense_graph.op(cut.op).inputs[0].name)
        return [self._applied(self.dense_graph, cut.op, environment[node]) for environment in self.dense.environments]

    @staticmethod
    def _applied(graph: FxGraph, name: str, x: torch.Tensor) -> torch.Tensor:
        op = graph.op(name)
        return torch.nn.functional.linear(x, graph.weight(op), graph.bias(op))

    @staticmethod
    def _ahead(stream: ActivationStream, names: Sequence[str]) -> list[list[torch.Tensor]]:
        """Per batch these values, with the stream left where it is."""
        execution = stream.execution
        nodes = [execution.graph.node(name) for name in names]
        stop = max(execution.position(node) for node in nodes) + 1
        found: list[list[torch.Tensor]] = []
        for environment in stream.environments:
            values: Mapping[torch.fx.Node, torch.Tensor] = execution.run(
                dict(environment), stream.position, stop, keep=nodes
            )
            found.append([values[node] for node in nodes])
        return found
