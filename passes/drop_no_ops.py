"""Remove ops that change nothing: casts to the dtype a tensor has, dropout at inference, aliases."""

from __future__ import annotations

from dotresize_fx.graph import Graph, Kind
from dotresize_fx.passes.pass_base import Pass, PassResult, promise


class DropNoOps(Pass):
    """Afterwards no op is left that hands its input on unchanged, and nothing that no output needs."""

    def call(self, graph: Graph) -> PassResult:
        idle = [op for op in graph.ops if op.kind is Kind.KEEP and op.attributes.get("no_op")]
        for op in idle:
            graph.bypass(op)
        dead = graph.remove_dead()
        if not idle and not dead:
            return PassResult()
        return PassResult((f"dropped {len(idle)} ops that change nothing and {dead} that nothing needs",))

    def ensures(self, graph: Graph) -> None:
        promise(not any(op.attributes.get("no_op") for op in graph.ops), "an op that changes nothing is left")
