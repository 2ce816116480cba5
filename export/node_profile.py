"""What every node of a graph took and multiplied, as ONNX Runtime's profiler saw it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dotresize_fx.export.onnx_macs import node_macs
from dotresize_fx.export.onnx_session import OnnxModel

_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class ProfiledNode:
    """``seconds`` a run (of a loop's node all its rounds). ``macs`` is None where its shapes do not tell."""

    name: str
    op: str
    seconds: float
    macs: int | None


def profile_nodes(
    path: Path | str,
    inputs: Mapping[str, np.ndarray[Any, Any]],
    *,
    threads: int | None,
    provider: str,
    runs: int,
    optimised: bool,
    equations: Mapping[str, str],
    work: Path,
) -> list[ProfiledNode]:
    """The nodes that ran, by ``runs`` runs behind one that does not count, in the order of the first.

    With ``optimised`` as the session runs them, fused; without it as the file has them, every node under its own name.
    ``equations`` are those of the file's Einsum nodes. Raises what :class:`OnnxModel` raises.
    """
    model = OnnxModel(path, threads=threads, provider=provider, profile=work / "profile", optimised=optimised)
    for _ in range(runs + 1):
        model(inputs)
    file = Path(model.session.end_profiling())
    events = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
    nodes: dict[str, ProfiledNode] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(_KERNEL) or event["ts"] < starts[1]:
            continue
        name, arguments = event["name"].removesuffix(_KERNEL), event["args"]
        op = arguments["op_name"]
        shapes = [
            [next(iter(entry.values())) for entry in arguments[f"{side}_type_shape"]] for side in ("input", "output")
        ]
        macs = node_macs(op, shapes[0], shapes[1], equations.get(name, ""))
        before = nodes.get(name, ProfiledNode(name, op, 0.0, 0))
        total = None if macs is None or before.macs is None else before.macs + macs
        nodes[name] = ProfiledNode(name, op, before.seconds + event["dur"] / 1e6, total)
    return [
        ProfiledNode(node.name, node.op, node.seconds / runs, None if node.macs is None else node.macs // runs)
        for node in nodes.values()
    ]
