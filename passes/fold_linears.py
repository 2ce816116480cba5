"""Multiply inserted linears into their neighbours, so that nothing inserted and nothing dense-sized is left."""

from __future__ import annotations

from collections import defaultdict

import torch

from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.passes.pass_base import Pass, PassResult, promise

# A table of 128 k rows in float64 at once would dwarf the model: rows are multiplied in slices of this many.
ROWS_AT_ONCE = 16384

# The factors that a shared weight's rows (0: (k, n) from the left) or columns (1: (n, k) from the right) wait to
# be multiplied by, with the op that asked.
Factors = dict[tuple[Value, int], list[tuple[Op, torch.Tensor]]]


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
            follows = before is not None and (before.is_linear or before.kind is Kind.EMBEDDING)
            alone = before is not None and len(graph.users(before.output)) == 1
            promise(follows and alone, f"{name} follows no weight of its own")
        for name in self.ups:
            users = graph.users(graph.op(name).output)
            promise(len(users) == 1 and users[0].is_linear, f"{name} has no reader of its own")

    def call(self, graph: Graph) -> PassResult:
        factors: Factors = defaultdict(list)
        for name in self.downs:
            self._fold_into_writer(graph, graph.op(name), factors)
        for name in self.ups:
            self._fold_into_reader(graph, graph.op(name), factors)
        for (_, axis), pairs in factors.items():
            self._multiply_shared(graph, axis, pairs)
        graph.remove_dead()
        return PassResult(tuple(f"folded {name}" for name in (*self.downs, *self.ups)))

    def _fold_into_writer(self, graph: Graph, op: Op, factors: Factors) -> None:
        """Rows of a linear's weight are mixed; a table or a shared weight is mixed later, all its users together."""
        writer = graph.producer(op.inputs[0])
        assert writer is not None
        mix, shift = graph.weight(op).double(), graph.bias(op)
        assert writer.weight is not None
        if writer.kind is Kind.EMBEDDING:
            promise(shift is None, f"{op.name}: a table cannot take a bias")
            factors[writer.weight, 1].append((writer, mix.T))
            graph.bypass(op)
            return
        weight, bias = graph.weight(writer), graph.bias(writer)
        graph.bypass(op)
        if len(graph.users(writer.weight)) > 1:
            factors[writer.weight, 0].append((writer, mix))
        else:
            graph.set_weight(graph.op(writer.name), (mix @ weight.double()).to(weight.dtype))
        if bias is not None or shift is not None:
            mixed = mix.new_zeros(len(mix)) if bias is None else mix @ bias.double()
            graph.set_bias(graph.op(writer.name), (mixed if shift is None else mixed + shift.double()).to(weight.dtype))

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
            factors[reader.weight, 1].append((reader, mix))
        else:
            graph.set_weight(reader, (weight.double() @ mix).to(weight.dtype))

    @staticmethod
    def _multiply_shared(graph: Graph, axis: int, pairs: list[tuple[Op, torch.Tensor]]) -> None:
        """Multiply a shared weight by each op's factor; those that still share it and ask for equal ones keep it so."""
        groups: list[tuple[Value | None, torch.Tensor, list[Op]]] = []
        for op, factor in pairs:
            held = graph.op(op.name).weight
            group = next((ops for value, other, ops in groups if value == held and torch.equal(other, factor)), None)
            if group is None:
                groups.append((held, factor, [op]))
            else:
                group.append(op)
        for _, factor, ops in groups:
            table = graph.weight(graph.op(ops[0].name))
            if axis == 0:
                product = (factor @ table.double()).to(table.dtype)
            else:
                parts = torch.split(table, ROWS_AT_ONCE)
                product = torch.cat([(part.double() @ factor).to(table.dtype) for part in parts])
            graph.set_weight([graph.op(op.name) for op in ops], product)

    def ensures(self, graph: Graph) -> None:
        left = {*self.downs, *self.ups} & set(graph.positions)
        promise(not left, f"inserted linears are left: {sorted(left)}")
