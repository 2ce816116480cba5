"""What every node of a graph took and multiplied, as ONNX Runtime's profiler saw it."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dotresize_fx.export.onnx_macs import node_macs
from dotresize_fx.export.onnx_session import OnnxModel

_KERNEL = "_kernel_time"  # a node's whole work, on any device
_GPU, _COPY = "Kernel", "memcpy"


@dataclass(frozen=True)
class ProfiledNode:
    """``seconds`` a run (of a loop's node all its rounds). ``macs`` is None where its shapes do not tell; ``picked`` is
    how many rows of a table a Gather picks.
    """

    name: str
    op: str
    seconds: float
    macs: int | None
    picked: int | None = None


@dataclass(frozen=True)
class Profile:
    """The ``nodes`` that ran, by the medians of all runs, in the order of the first.

    ``kernels`` are the seconds a run that a GPU's kernels took, None where the profiler saw none. ``launching`` is the
    share of a run that its nodes took: on a GPU what launching them takes, and waiting where its queue is full.
    """

    nodes: list[ProfiledNode]
    kernels: float | None
    launching: float | None

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Profile:
        return cls(**{**content, "nodes": [ProfiledNode(**node) for node in content["nodes"]]})


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
) -> Profile:
    """What the profiler says of ``runs`` runs; nodes by their medians, or the ``fastest``.

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
    return read_profile(events, runs=runs, warmup=warmup, equations=equations, fastest=fastest)


def read_profile(
    events: Sequence[Mapping[str, Any]],
    *,
    runs: int,
    warmup: int = 0,
    equations: Mapping[str, str],
    fastest: bool = False,
) -> Profile:
    """What the events tell of ``runs`` runs behind ``warmup`` others."""
    whole = sorted((event for event in events if event.get("name") == "model_run"), key=lambda event: event["ts"])
    starts = [event["ts"] for event in whole]
    seconds: dict[str, list[float]] = {}
    found: dict[str, ProfiledNode] = {}
    kernels, launched = [0.0] * runs, [0.0] * runs
    for event in events:
        run = bisect_right(starts, event.get("ts", -1)) - 1 - warmup
        if not 0 <= run < runs:
            continue
        if event.get("cat") == _GPU:
            # Copies are listed there too.
            kernels[run] += 0.0 if event["name"].lower().startswith(_COPY) else event["dur"] / 1e6
        if event.get("cat") != "Node" or not event["name"].endswith(_KERNEL):
            continue
        name, arguments = event["name"].removesuffix(_KERNEL), event["args"]
        seconds.setdefault(name, [0.0] * runs)[run] += event["dur"] / 1e6
        launched[run] += event["dur"] / 1e6
        if run == 0:
            node = _node(name, arguments, equations.get(name, ""))
            found[name] = _both(found[name], node) if name in found else node  # a loop's node runs more than once
    shares = [
        taken / (event["dur"] / 1e6) for taken, event in zip(launched, whole[warmup:], strict=False) if event["dur"]
    ]
    # A run of a node that the system put aside for a while would weigh more than all its others.
    typical = min if fastest else median
    return Profile(
        nodes=[replace(node, seconds=typical(seconds[name])) for name, node in found.items()],
        kernels=median(kernels) or None,
        launching=median(shares) if shares else None,
    )


def _node(name: str, arguments: Mapping[str, Any], equation: str) -> ProfiledNode:
    op = arguments["op_name"]
    inner, outer = (_shapes(arguments[f"{side}_type_shape"]) for side in ("input", "output"))
    picked = prod(inner[1]) if op.startswith("Gather") and len(inner) > 1 else None
    return ProfiledNode(name, op, 0.0, node_macs(op, inner, outer, equation), picked)


def _both(one: ProfiledNode, other: ProfiledNode) -> ProfiledNode:
    return replace(one, macs=_sum(one.macs, other.macs), picked=_sum(one.picked, other.picked))


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def _shapes(types: list[dict[str, list[int]]]) -> list[list[int]]:
    """Of [{"float": [2, 16, 40]}, ...]."""
    return [next(iter(entry.values())) for entry in types]
