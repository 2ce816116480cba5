"""Solvers: (region, statistics, k) -> map. Adding a method is adding a file here and a line below."""

from __future__ import annotations

from collections.abc import Callable

from dotresize_fx.errors import UsageError
from dotresize_fx.gram import RegionStatistics
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region
from dotresize_fx.solvers.dotresize import solve_dotresize
from dotresize_fx.solvers.magnitude import solve_magnitude
from dotresize_fx.solvers.obs import solve_obs
from dotresize_fx.solvers.pca import solve_pca

Solver = Callable[[Region, RegionStatistics, int], RegionMap]

SOLVERS: dict[str, Solver] = {
    "dotresize": solve_dotresize,
    "magnitude": solve_magnitude,
    "obs": solve_obs,
    "pca": solve_pca,
}


def solver(method: str) -> Solver:
    """The solver of this name.

    Raises:
        UsageError: there is none.
    """
    if method not in SOLVERS:
        raise UsageError(f"unknown method {method!r}: choose one of {', '.join(sorted(SOLVERS))}")
    return SOLVERS[method]
