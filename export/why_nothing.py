"""Why an ONNX file has no width that can be cut, in a phrase."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from dotresize_fx.onnx_form.form import bodies
from dotresize_fx.regions import MatchReport

LINEARS = ("MatMul", "Gemm")


def why_nothing(model: ir.Model, matches: MatchReport) -> str:
    """The cause that a user can do something about, else what most linears were left alone for."""
    if quantised := quantised_linears(matches):
        return f"the weights of {quantised} of {len(matches.linears)} linears are quantised: give the model before that"
    if unknown := next((str(value.name) for value in model.graph.inputs if value.shape is None), ""):
        return f"input {unknown} has no shape: export the model with one"
    given = (value for value in model.graph.inputs if value.name in model.graph.initializers)
    if any(value.shape is not None and len(value.shape) == 2 for value in given):
        return "its weights are inputs of the graph, which a caller may set: export it with weights that are none"
    inner = (node for outer in model.graph for body in bodies(outer) for node in body.all_nodes())
    if any(node.op_type in LINEARS for node in inner):
        return "linears stand inside an If or a Loop, or their widths go in there, where none is cut"
    if not matches.linears:
        return "it has no linear with a weight of its own"
    if any(row.writes_reason.startswith("Cast ") for row in matches.linears):
        return "its weights are cast before they are used: store them in the type that they are used in"
    reasons = Counter(row.writes_reason or row.reads_reason for row in matches.linears)
    return reasons.most_common(1)[0][0]


def quantised_linears(matches: MatchReport) -> int:
    """How many of a model's linears are left alone because of that."""
    return sum("quantised" in row.reason for row in matches.linears)
