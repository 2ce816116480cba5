"""Which ops of a graph are ONNX Runtime's own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx

# ONNX Runtime put it in the standard's domain, where the standard does not know it.
MISPLACED = ("SimplifiedLayerNormalization",)


def fused_ops(path: Path) -> Counter[str]:
    """How many of each a file holds, by op type."""
    graph = onnx.load(path, load_external_data=False).graph
    return Counter(node.op_type for node in graph.node if node.domain or node.op_type in MISPLACED)


def count_fused_ops(path: Path, target: str) -> str:
    """A line for the report."""
    found = fused_ops(path)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
    return f"--target {target}: the ONNX holds {counts or 'no fused op'}, and standard ops for the rest"
