"""Functions of an ONNX model, written out where a width crosses them; the others stay functions."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.regions import Region, RegionKind

# In a node's meta, which copies keep: the function that it stands in.
_OF = "dotresize_fx.of_function"
Ends = set[tuple[object, ...]]


def inline_crossed(model: ir.Model) -> tuple[ir.Model, tuple[str, ...]]:
    """The model, or a copy with the functions inlined that stand between the ends of a region; notes.

    What a function's ops do to a width is seen once it is written out. If more regions are found then, the functions
    stay inlined that have an op of one.
    """
    if not any(node.op_identifier() in model.functions for node in model.graph):
        return model, ()
    marked = model.clone()
    for key, function in marked.functions.items():
        for node in function:
            node.meta[_OF] = key
    try:
        whole = _inlined(marked, marked.functions)
    except ValueError:  # of another opset than the model
        return model, ("functions of the file could not be inlined, as they are of other opsets: left alone",)
    graph, found = _regions(whole)
    if len(found) <= len(_regions(model)[1]):
        return model, ()
    crossed = _callers(model, _crossed(graph, found))
    fewest = _inlined(model, crossed)
    if _ends(_regions(fewest)[1]) != _ends(found):
        crossed, fewest = set(model.functions), _inlined(model, model.functions)
    names = ", ".join(sorted({name for _, name, _ in crossed}))
    return fewest, (f"functions of the file were inlined, as widths cross them: {names}",)


def _inlined(model: ir.Model, chosen: Iterable[ir.OperatorIdentifier]) -> ir.Model:
    keys = set(chosen)
    return InlinePass(criteria=lambda function: function.identifier() in keys)(model.clone()).model


def _regions(model: ir.Model) -> tuple[OnnxGraph, list[Region]]:
    graph = OnnxGraph(model.clone())
    canonicalise(graph, check=False)
    return graph, [region for region in find_regions(graph).regions if region.kind is not RegionKind.RESIDUAL]


def _ends(regions: Iterable[Region]) -> Ends:
    return {(region.kind, region.width, len(region.writers), len(region.readers)) for region in regions}


def _crossed(graph: OnnxGraph, regions: Iterable[Region]) -> set[ir.OperatorIdentifier]:
    """The functions that an op of a region came of."""
    named = {
        name
        for region in regions
        for name in (*region.writers, *region.readers, *region.crossed, region.attention, region.target)
    }
    nodes = [node for node in graph.model.graph if named & {str(output.name) for output in node.outputs}]
    nodes += [node for node in graph.parts_of_attentions if _OF in node.meta]
    return {node.meta[_OF] for node in nodes if _OF in node.meta}


def _callers(model: ir.Model, keys: set[ir.OperatorIdentifier]) -> set[ir.OperatorIdentifier]:
    """Those functions, and those that call them."""
    found, count = set(keys), 0
    while len(found) > count:
        count = len(found)
        found |= {key for key, function in model.functions.items() if any(n.op_identifier() in found for n in function)}
    return found
