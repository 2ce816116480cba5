"""Remove ops that change nothing: casts to the dtype a tensor has, dropout at inference, aliases, slices of all."""

from __future__ import annotations

from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.passes.pass_base import Pass, PassResult, promise


class DropNoOps(Pass):
    """Afterwards no op is left that hands its input on unchanged, and nothing that no output needs."""

    def call(self, graph: Graph) -> PassResult:
        records = graph.drop_in_place()
        idle = [op for op in graph.ops if op.kind is Kind.KEEP and op.attributes.get("no_op")]
        for op in idle:
            graph.bypass(op)
        whole = [op.name for op in graph.ops if _handed_on(op) is not None]
        for name in whole:
            op = graph.op(name)
            value = _handed_on(op)  # what it reads may be what another one handed on
            assert value is not None
            graph.redirect(op, value)
        dead = graph.remove_dead()
        dropped = len(idle) + len(whole)
        if not dropped and not dead:
            return PassResult(tuple(records))
        return PassResult(
            (
                *records,
                f"dropped {dropped} ops that change nothing and {dead - len(whole)} that nothing needs",
            )
        )

    def ensures(self, graph: Graph) -> None:
        left = any(op.attributes.get("no_op") or _handed_on(op) is not None for op in graph.ops)
        promise(not left, "an op that changes nothing is left")


def _handed_on(op: Op) -> Value | None:
    """What a slice of the whole last axis takes, or a concatenation on it with nothing else than empty parts.

    So a rotary embedding is spelled that could leave a part of the head unrotated, and here leaves none.
    """
    form, last = op.attributes.get("form"), len(op.output.shape) - 1
    if form not in ("slice", "concat") or op.attributes["axis"] != last or op.output.width in (None, 0):
        return None
    filled = [value for value in op.inputs if value.width != 0]
    same = [value for value in filled if value.shape == op.output.shape]
    # A slice's other inputs are computed ends: then its width would not be known.
    return same[0] if len(filled) == len(same) == 1 and not same[0].is_parameter else None
