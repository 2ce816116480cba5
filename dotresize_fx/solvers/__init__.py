"""Solvers: (region, statistics, k) -> map. Adding a method is adding a file here and lines below.

A curve is (region, statistics) -> (n + 1,) float64: what a cut to each width loses, in units of its own. Only its
shape matters: the planner prices it by a measured loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dotresize_fx.expert_statistics import per_expert, per_expert_curve
from dotresize_fx.gram import RegionStatistics
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region, RegionKind
from dotresize_fx.solvers.dotresize import solve_dotresize
from dotresize_fx.solvers.kv_heads import kv_heads_curve, solve_kv_heads
from dotresize_fx.solvers.magnitude import solve_magnitude
from dotresize_fx.solvers.obs import obs_curve, solve_obs
from dotresize_fx.solvers.pca import solve_pca
from dotresize_fx.solvers.query_key import drop_query_key, query_key_curve, solve_query_key
from dotresize_fx.solvers.value_rank import solve_value_rank, value_rank_curve

Solver = Callable[[Region, RegionStatistics, int], RegionMap]
Curve = Callable[[Region, RegionStatistics], torch.Tensor]

SOLVERS: dict[str, Solver] = {
    "dotresize": solve_dotresize,
    "kv-heads": solve_kv_heads,
    "magnitude": solve_magnitude,
    "obs": solve_obs,
    "pca": solve_pca,
    "query-key": solve_query_key,
    "query-key-drop": drop_query_key,
    "value-rank": solve_value_rank,
}
CURVES: dict[RegionKind, Curve] = {
    RegionKind.EXPERTS: per_expert_curve(obs_curve),
    RegionKind.FFN: obs_curve,
    RegionKind.HEADS: kv_heads_curve,
    RegionKind.QUERY_KEY: query_key_curve,
    RegionKind.VALUE: value_rank_curve,
}
# Heads have one closed form each, whatever method the FFN is cut by.
_HEADS = {RegionKind.HEADS: ("kv-heads",), RegionKind.QUERY_KEY: ("query-key",), RegionKind.VALUE: ("value-rank",)}
# Of several, the sweep takes what held-out error says is best.
METHODS: dict[str, dict[RegionKind, tuple[str, ...]]] = {
    "auto": {
        RegionKind.EXPERTS: ("obs",),
        RegionKind.FFN: ("obs", "dotresize"),
        RegionKind.RESIDUAL: ("pca",),
        **_HEADS,
    },
    "obs": {RegionKind.EXPERTS: ("obs",), RegionKind.FFN: ("obs",), **_HEADS},
    "dotresize": {RegionKind.FFN: ("dotresize",), RegionKind.RESIDUAL: ("dotresize",), **_HEADS},
    "pca": {RegionKind.RESIDUAL: ("pca",)},
    "magnitude": {
        RegionKind.EXPERTS: ("magnitude",),
        RegionKind.FFN: ("magnitude",),
        RegionKind.RESIDUAL: ("magnitude",),
    },
}


def solvers_for(method: str, kind: RegionKind) -> tuple[tuple[str, Solver], ...]:
    """(name, solver) of what a method tries on regions of this kind; empty where it cuts none of them."""
    found = [(name, SOLVERS[name]) for name in METHODS[method].get(kind, ())]
    return tuple((name, per_expert(solver) if kind is RegionKind.EXPERTS else solver) for name, solver in found)
