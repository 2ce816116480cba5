"""See GPT-2's spelling of a linear, reshape -> addmm -> reshape, as one linear."""

from __future__ import annotations

from dotresize_fx.graph import Graph, Kind, Op
from dotresize_fx.passes.pass_base import Pass, PassResult


class RecogniseLinears(Pass):
    """``reshape(addmm(bias, reshape(x), weight))`` becomes ``linear(x, weight.T, bias)``.

    The reshapes must undo each other: they join all dimensions but the last and split them again, so that the
    linear acts on the same last dimension. An ``addmm`` on a matrix that was not reshaped is a linear as it stands, and
    so is a product with a weight, be it turned round or not.
    """

    def call(self, graph: Graph) -> PassResult:
        records = [self._rewrite(graph, op) for op in graph.ops if op.kind is Kind.ADDMM]
        graph.remove_dead()
        return PassResult(tuple(r for r in records if r))

    def _rewrite(self, graph: Graph, op: Op) -> str:
        if op.attributes.get("bare"):
            graph.replace_with_linear(op, op.inputs[0], op)
            return f"{op.name}: product with a weight seen as a linear"
        if len(op.inputs) != 3:
            return ""
        bias, source, weight = op.inputs
        if not (bias.is_parameter and weight.is_parameter and len(bias.shape) == 1):
            return ""
        joined = graph.producer(source)
        users = graph.users(op.output)
        undone = op.output not in graph.outputs and all(self._undoes(joined, u) for u in users if joined)
        if joined is not None and joined.attributes.get("reshape") and undone:
            for last in users:
                graph.replace_with_linear(last, joined.inputs[0], op)
        else:
            graph.replace_with_linear(op, source, op)
        return f"{graph.parameter_name(weight)}: addmm seen as a linear"

    @staticmethod
    def _undoes(joined: Op, split: Op) -> bool:
        """Whether ``split`` restores the leading dimensions that ``joined`` flattened."""
        before, after = joined.inputs[0], split.output
        same_width = before.width == joined.output.width and split.inputs[0].width == after.width
        return bool(split.attributes.get("reshape")) and same_width and before.shape[:-1] == after.shape[:-1]
