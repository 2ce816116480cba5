"""Reduced-order linears for a whole graph: which of them, with what rank, solved one after the other, then put in."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

import torch

from dotresize_fx.calibration_runs import AnyGraph, rank_sums
from dotresize_fx.cost import block_linears, count_cost
from dotresize_fx.errors import NothingToSlimError, UsageError
from dotresize_fx.fidelity import Inputs
from dotresize_fx.graph import Graph, Kind, Op
from dotresize_fx.passes.factorize_linear import FactorizeLinear, why_not_factorized
from dotresize_fx.passes.find_blocks import Block, find_blocks
from dotresize_fx.progress import Progress
from dotresize_fx.rank.budget import budget_rank, last_blocks
from dotresize_fx.rank.low_rank_linear import LowRankLinear
from dotresize_fx.rank.rank_sweep import RankCut, RankSweep

# What may stand between a linear and the sum that the stream takes it in by.
_PASSED = (Kind.KEEP, Kind.RESHAPE, Kind.ADD)


@dataclass(frozen=True)
class Factorized(Generic[AnyGraph]):
    """A graph with linears of lower rank; ``ranks`` and held-out ``errors`` by op name, and notes for the report."""

    graph: AnyGraph
    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    notes: tuple[str, ...] = ()


def published_ranks(graph: Graph, ratio: float, *, everywhere: bool = False) -> list[RankCut]:
    """The cuts that LLM-ROM makes for a ratio: all linears of the last blocks, with one budget (rank/budget.py).

    ``everywhere``: all blocks, with one budget for all, which the paper warns of.

    Raises:
        NothingToSlimError: there are no blocks, or the ratio leaves no rank.
    """
    blocks = find_blocks(graph)
    count, budget = (len(blocks), 1 - ratio) if everywhere else last_blocks(ratio, len(blocks))
    cuts = []
    for block in blocks[len(blocks) - count :]:
        for op in factorable(graph, block):
            rows, columns = graph.weight(op).shape
            cuts.append(RankCut(op.name, budget_rank(budget, rows, columns), stream_target(graph, op, block.states)))
    if not cuts:
        raise NothingToSlimError("no linear in the blocks has a weight of its own, so none can be of lower rank")
    return cuts


def factorable(graph: Graph, block: Block) -> list[Op]:
    """The block's linears that two could stand for."""
    inside = {op.name for op in block_linears(graph)} & set(block.ops)
    return [graph.op(name) for name in block.ops if name in inside and not why_not_factorized(graph, name)]


def stream_target(graph: Graph, op: Op, states: Collection[str]) -> str:
    """The name of the state that the op's output is added into as it is; empty where something else comes first."""
    users = graph.users(op.output)
    while len(users) == 1 and users[0].kind in _PASSED:
        if users[0].name in states and users[0].kind is Kind.ADD:
            return users[0].name
        users = graph.users(users[0].output)
    return ""


def factorize_graph(
    dense: AnyGraph,
    batches: Sequence[Inputs],
    cuts: Sequence[RankCut],
    progress: Progress,
    *,
    slim: AnyGraph | None = None,
    published: bool = False,
    dense_targets: bool = True,
    sequential: bool = True,
    guard: bool = True,
    check: bool = False,
    device: str = "cpu",
) -> Factorized[AnyGraph]:
    """``slim``, a copy of ``dense`` that may have changed before (None: a fresh one), with two linears for each of
    ``cuts``, in place. The rest: see RankSweep, ``rank_sums`` and FactorizeLinear.

    Raises:
        UsageError: a rank that is 0 or beyond its linear's size, or that the guard refuses.
    """
    slim = dense.copy() if slim is None else slim
    for cut in cuts:
        op = slim.op(cut.op)
        rows, columns = slim.weight(op).shape
        if not 1 <= cut.rank <= min(rows, columns):
            raise UsageError(f"{cut.op}: a rank of {cut.rank} does not go with {rows} x {columns}")
        if not published and slim.bias(op) is None:
            slim.set_bias(op, slim.weight(op).new_zeros(rows))
    targets = dense_targets and not published
    with torch.no_grad(), progress.stage("factorize", len(cuts)) as step:
        sums = rank_sums(dense, slim, batches, dense_targets=targets, sequential=sequential, device=device)
        found = RankSweep(slim, sums, published=published).solve(cuts, step)
    FactorizeLinear({name: one.factors for name, one in found.items()}, guard=guard)(slim, check=check)
    slim.refresh_shapes()
    left = count_cost(slim, 1).block_linear_weights / count_cost(dense, 1).block_linear_weights
    return Factorized(
        slim,
        {name: one.factors.rank for name, one in found.items()},
        {name: one.error for name, one in found.items() if one.error is not None},
        (f"{len(found)} linears are two of a lower rank now: {1 - left:.1%} of the block weights went",),
    )


def low_rank_linears(dense: Graph, found: Factorized[AnyGraph]) -> tuple[LowRankLinear, ...]:
    """The linears of the ``dense`` graph that are two in what was ``found``, in its order."""
    told = []
    for name in sorted(found.ranks, key=lambda name: dense.positions[name]):
        op = dense.op(name)
        rows, columns = dense.weight(op).shape
        called = name if op.weight is None else dense.parameter_name(op.weight).removesuffix(".weight")
        told.append(LowRankLinear(name, called, rows, columns, found.ranks[name], found.errors.get(name)))
    return tuple(told)
