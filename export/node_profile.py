"""What every node of a graph took and multiplied, as ONNX Runtime's profiler saw it."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
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
    fastest: bool = False,
) -> list[ProfiledNode]:
    """The nodes that ran, by the medians of ``runs`` runs (or the ``fastest``), in the order of the first.

    With ``optimised`` as the session runs them, fused, behind a run that does not count; without it as the file has
    them, every node under its own name. ``equations`` are those of the file's Einsum nodes. Raises what
    :class:`OnnxModel` raises.
    """
    model = OnnxModel(path, threads=threads, provider=provider, profile=work / "profile", optimised=optimised)
    warmup = 1 if optimised else 0
    for _ in range(runs + warmup):
        model(inputs)
    file = Path(model.session.end_profiling())
    events = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
    seconds: dict[str, list[float]] = {}
    found: dict[str, ProfiledNode] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(_KERNEL):
            continue
        run = bisect_right(starts, event["ts"]) - 1 - warmup
        if run < 0:
            continue
        name, arguments = event["name"].removesuffix(_KERNEL), event["args"]
        seconds.setdefault(name, [0.0] * runs)[run] += event["dur"] / 1e6
        if run == 0:
            op = arguments["op_name"]
            inner, outer = (_shapes(arguments[f"{side}_type_shape"]) for side in ("input", "output"))
            macs = node_macs(op, inner, outer, equations.get(name, ""))
            before = found[name].macs if name in found else 0  # a loop's node runs more than once
            found[name] = ProfiledNode(name, op, 0.0, None if macs is None or before is None else before + macs)
    # A run of a node that the system put aside for a while would weigh more than all its others.
    typical = min if fastest else median
    return [replace(node, seconds=typical(seconds[name])) for name, node in found.items()]


def _shapes(types: list[dict[str, list[int]]]) -> list[list[int]]:
    """Of [{"float": [2, 16, 40]}, ...]."""
    return [next(iter(entry.values())) for entry in types]
