"""Take blocks out of a graph: what read the stream behind one reads the stream before it."""

from __future__ import annotations

from collections.abc import Sequence

from dotresize_fx.graph import Graph
from dotresize_fx.passes.find_blocks import Block
from dotresize_fx.passes.pass_base import Pass, PassResult, promise


class DropLayers(Pass):
    """Afterwards nothing of the blocks is left, nor their part of the cache; the layers of the cache close up."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks

    def requires(self, graph: Graph) -> None:
        for block in self.blocks:
            inside = set(block.ops)
            for name in block.ops[:-1]:
                op = graph.op(name)
                output = op.output
                read = all(user.name in inside for value in (output, *graph.beside(op)) for user in graph.users(value))
                promise(read, f"{name}, inside a block, is read from outside")
                put_out = output in graph.outputs and name not in block.caches
                promise(not put_out, f"{name}, inside a block, is an output of the graph")

    def call(self, graph: Graph) -> PassResult:
        records = []
        from_the_back = sorted(self.blocks, key=lambda one: graph.positions[one.end.name], reverse=True)
        for block in from_the_back:
            graph.redirect(graph.op(block.ops[-1]), block.start)
            records.append(f"{block.end.name}: the block that put it out is gone")
        if caches := [name for block in self.blocks for name in block.caches]:
            graph.remove_caches(caches)
        for block in from_the_back:  # also what writes into a tensor of its own, which is not found dead
            graph.remove_ops([name for name in block.ops if name in graph.positions and name not in block.caches])
        graph.remove_dead()
        return PassResult(tuple(records))

    def ensures(self, graph: Graph) -> None:
        # An output keeps its name: one that a block put out hands the stream on now, a cache is another layer's.
        inside = {name for block in self.blocks for name in block.ops} - {value.name for value in graph.outputs}
        left = inside & set(graph.positions)
        promise(not left, f"ops of a dropped block are left: {sorted(left)}")
