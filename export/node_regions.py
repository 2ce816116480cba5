"""Which part of a model an ONNX node belongs to, by what exporters leave of names."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

import onnx

ELSEWHERE = "elsewhere"
_SCOPES = "pkg.torch.onnx.name_scopes"


def node_modules(graph: onnx.GraphProto) -> dict[str, str]:
    """By node name the module it came from ("model.layers.0.mlp.up_proj"); nodes that nothing tells of are left out.

    Told by torch's exporter (metadata of the node), by the name of a weight that it reads, or by the path that older
    exporters put into its own name ("/model/layers.0/mlp/up_proj/MatMul").
    """
    weights = {tensor.name for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        path = _scope(node) or _weight(node, weights) or ".".join(node.name.strip("/").split("/")[:-1])
        if path:
            found[node.name] = path
    return found


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
