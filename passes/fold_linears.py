"""Multiply inserted linears into their neighbours, so that nothing inserted and nothing dense-sized is left."""

from __future__ import annotations

from collections import defaultdict

import torch

from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.passes.pass_base import Pass, PassResult, promise

# A table of 128 k rows in float64 at once would dwarf the model: rows are multiplied in slices of this many.
ROWS_AT_ONCE = 16384

# The (n, k) factors that a shared weight waits to be multiplied by, with the op that asked.
Factors = dict[Value, list[tuple[Op, torch.Tensor]]]


class FoldLinears(Pass):
    """``linear(linear(x, A, a), B, b)`` becomes ``linear(x, B A, b + B a)``; a table times a linear becomes a table.

    Only the named ops are folded away, ``downs`` into the op before them and ``ups`` into the op behind. Weights
    that several ops share stay shared when all of them fold the same factor. Products are taken in float64 and
    stored in the weight's dtype.
    """

    def __init__(self, downs: list[str], ups: list[str]) -> None:
        self.downs, self.ups = downs, ups

    def requires(self, graph: Graph) -> None:
        for name in self.downs:
            before = graph.producer(graph.op(name).inputs[0])
            alone = before is not None and len(graph.users(before.output)) == 1
            promise(alone and before.kind in (Kind.LINEAR, Kind.EMBEDDING), f"{name} follows no weight of its own")
        for name in self.ups:
            users = graph.users(graph.op(name).output)
            promise(len(users) == 1 and users[0].kind is Kind.LINEAR, f"{name} has no reader of its own")

    def call(self, graph: Graph) -> PassResult:
        factors: Factors = defaultdict(list)
        for name in self.downs:
            self._fold_into_writer(graph, graph.op(name), factors)
        for name in self.ups:
            self._fold_into_reader(graph, graph.op(name), factors)
        for pairs in factors.values():
            self._multiply_tables(graph, pairs)
        graph.remove_dead()
        return PassResult(tuple(f"folded {name}" for name in (*self.downs, *self.ups)))

    def _fold_into_writer(self, graph: Graph, op: Op, factors: Factors) -> None:
        """Rows of a linear's weight are mixed; a table is mixed later, all its users together."""
        writer = graph.producer(op.inputs[0])
        assert writer is not None
        mix, shift = graph.weight(op).double(), graph.bias(op)
        if writer.kind is Kind.EMBEDDING:
            promise(shift is None, f"{op.name}: a table cannot take a bias")
            assert writer.weight is not None
            factors[writer.weight].append((writer, mix.T))
            graph.bypass(op)
            return
        weight, bias = graph.weight(writer), graph.bias(writer)
        graph.bypass(op)
        graph.set_weight(graph.op(writer.name), (mix @ weight.double()).to(weight.dtype))
        if bias is not None or shift is not None:
            mixed = 0 if bias is None else mix @ bias.double()
            graph.set_bias(graph.op(writer.name), (mixed + (0 if shift is None else shift.double())).to(weight.dtype))

    def _fold_into_reader(self, graph: Graph, op: Op, factors: Factors) -> None:
        """Columns of the reader's weight are mixed; one that a table shares waits for the table."""
        reader = graph.users(op.output)[0]
        mix, shift = graph.weight(op).double(), graph.bias(op)
        weight = graph.weight(reader)
        if shift is not None:
            own = graph.bias(reader)
            moved = weight.double() @ shift.double()
            graph.set_bias(reader, (moved if own is None else own.double() + moved).to(weight.dtype))
        graph.bypass(op)
        reader = graph.op(reader.name)
        assert reader.weight is not None
        if len(graph.users(reader.weight)) > 1:
            factors[reader.weight].append((reader, mix))
        else:
            graph.set_weight(reader, (weight.double() @ mix).to(weight.dtype))

    @staticmethod
    def _multiply_tables(graph: Graph, pairs: list[tuple[Op, torch.Tensor]]) -> None:
        """Multiply a shared (rows, n) weight by each op's (n, k) factor; equal factors keep it shared."""
        groups: list[tuple[torch.Tensor, list[Op]]] = []
        for op, factor in pairs:
            group = next((ops for other, ops in groups if torch.equal(other, factor)), None)
            if group is None:
                groups.append((factor, [op]))
            else:
                group.append(op)
        for factor, ops in groups:
            table = graph.weight(graph.op(ops[0].name))
            rows = [(part.double() @ factor).to(table.dtype) for part in table.split(ROWS_AT_ONCE)]
            graph.set_weight([graph.op(op.name) for op in ops], torch.cat(rows))

    def ensures(self, graph: Graph) -> None:
        left = {*self.downs, *self.ups} & set(graph.positions)
        promise(not left, f"inserted linears are left: {sorted(left)}")
