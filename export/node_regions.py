"""Which part of a model an ONNX node belongs to, by what exporters leave of names."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import takewhile

import onnx

ELSEWHERE = "elsewhere"
_SCOPES = "pkg.torch.onnx.name_scopes"


def node_modules(graph: onnx.GraphProto) -> dict[str, str]:
    """By node name the module it came from ("model.layers.0.mlp.up_proj"); nodes that nothing tells of are left out.

    Told by torch's exporter (metadata of the node), by the name of a weight that it alone reads, or by the path that
    older exporters put into its own name ("/model/layers.0/mlp/up_proj/MatMul"). What a rewrite made of others (a
    fused op, a packed product) has none of these: it belongs to what all those have in common that go on with it, or
    else to what all those have in common that it goes on with.
    """
    reads = Counter(name for node in graph.node for name in node.input)
    weights = {tensor.name for tensor in graph.initializer if reads[tensor.name] == 1}
    told = [
        _scope(node) or _weight(node, weights) or ".".join(node.name.strip("/").split("/")[:-1]) for node in graph.node
    ]
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    before = [[makers[name] for name in node.input if name in makers] for node in graph.node]
    users: dict[str, list[int]] = defaultdict(list)
    for index, node in enumerate(graph.node):
        for name in node.input:
            users[name].append(index)
    # Of a norm that adds first, the sum goes on to the next layer: it is there for what it norms.
    given = [node.output[:1] if node.op_type.startswith("Skip") else node.output for node in graph.node]
    behind = [[user for name in names for user in users[name]] for names in given]
    order = range(len(graph.node))  # topological, as ONNX wants it
    for neighbours, walk in ((behind, reversed(order)), (before, order)):
        for index in walk:
            told[index] = told[index] or _common([told[other] for other in neighbours[index] if told[other]])
    return {node.name: path for node, path in zip(graph.node, told, strict=True) if path}


def _common(modules: list[str]) -> str:
    """The module that all of them are in or are; nothing where they share none."""
    if not modules:
        return ""
    parts = [module.split(".") for module in modules]
    shared = takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return ".".join(level[0] for level in shared)


def _scope(node: onnx.NodeProto) -> str:
    said = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    try:
        scopes = ast.literal_eval(said)
    except (ValueError, SyntaxError):
        return ""
    # The last one is the op's own name; where a pass put the op in, or torch, it has no module.
    inner = [scope for scope in scopes[:-1] if isinstance(scope, str) and not scope.startswith("_")]
    return inner[-1] if inner else ""


def _weight(node: onnx.NodeProto, weights: set[str]) -> str:
    named = [name for name in node.input if name in weights and "." in name]
    return named[0].rpartition(".")[0] if named else ""


def original_name(name: str, known: Mapping[str, object]) -> str:
    """The name in the file of a node that ONNX Runtime fused ("node_silu/QuickGeluFusion/"), else ``name``."""
    for end in range(len(name), 0, -1):
        if name[:end] in known and (end == len(name) or name[end] in "/_"):
            return name[:end]
    return name


def role(module: str) -> str:
    """The module in whichever layer: "model.layers.*.mlp.up_proj"."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", module) or ELSEWHERE


def layer(module: str) -> str:
    """The layer that the module is in: "model.layers.3"; elsewhere for one that is in none."""
    found = re.match(r"(.*?\.\d+)(\.|$)", module)
    return found[1] if found else ELSEWHERE
