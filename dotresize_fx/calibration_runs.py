"""What runs a graph on calibration data, be it a program or ONNX."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from dotresize_fx.depth.program_states import program_states
from dotresize_fx.fidelity import Inputs
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.least_squares import PULL
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.onnx_form.rank_sums import OnnxRankSums
from dotresize_fx.onnx_form.states import onnx_states
from dotresize_fx.onnx_form.sweep import OnnxSweep
from dotresize_fx.rank.program_sums import ProgramRankSums
from dotresize_fx.rank.rank_sweep import RankSums
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region
from dotresize_fx.sweep import Sweep

# Dense and slim are of one form.
AnyGraph = TypeVar("AnyGraph", FxGraph, OnnxGraph)


def rank_sums(
    dense: AnyGraph,
    slim: AnyGraph,
    batches: Sequence[Inputs],
    *,
    dense_targets: bool = True,
    sequential: bool = True,
    device: str = "cpu",
) -> RankSums:
    """See :class:`RankSums`. ``device``: an ONNX graph's; a program is where its weights are."""
    if isinstance(dense, OnnxGraph) and isinstance(slim, OnnxGraph):
        return OnnxRankSums(dense, slim, batches, dense_targets=dense_targets, sequential=sequential, device=device)
    assert isinstance(dense, FxGraph)
    assert isinstance(slim, FxGraph)
    return ProgramRankSums(dense, slim, batches, dense_targets=dense_targets, sequential=sequential)


def stream_states(
    graph: FxGraph | OnnxGraph, states: Sequence[str], batches: Sequence[Inputs], device: str = "cpu"
) -> Iterable[Iterable[torch.Tensor]]:
    """By batch the real tokens' rows of each state, by the names of the values."""
    if isinstance(graph, OnnxGraph):
        return onnx_states(graph, states, batches, device)
    return program_states(graph, states, batches)


def reader_sweep(
    dense: AnyGraph,
    slim: AnyGraph,
    batches: Sequence[Inputs],
    apply: Callable[[Region, RegionMap], None],
    *,
    repair_steps: int = 0,
    repair_rate: float | None = None,
    pull: float = PULL,
    seed: int = 0,
    device: str = "cpu",
) -> Sweep | OnnxSweep:
    """A sweep in which readers are refitted; ``apply`` folds what was solved for into ``slim``. The rest: see Sweep; an
    ONNX graph is not repaired.
    """
    if isinstance(dense, OnnxGraph) and isinstance(slim, OnnxGraph):
        return OnnxSweep(dense, slim, batches, apply, pull=pull, device=device)
    assert isinstance(dense, FxGraph)
    assert isinstance(slim, FxGraph)
    repair: dict[str, Any] = {"repair_steps": repair_steps, "repair_rate": repair_rate}
    return Sweep(dense, slim, batches, apply, pull=pull, seed=seed, **repair)
