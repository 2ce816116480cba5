"""The list of solvers, and what each method tries on each kind of region."""

from __future__ import annotations

import pytest

from dotresize_fx.regions import ATTENTION_KINDS, RegionKind
from dotresize_fx.solvers import CURVES, METHODS, SOLVERS, solvers_for

SWEPT = (RegionKind.FFN, RegionKind.EXPERTS, *ATTENTION_KINDS)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_names_solvers_that_there_are(method: str) -> None:
    kinds = METHODS[method]
    assert kinds
    for kind, names in kinds.items():
        assert names
        found = solvers_for(method, kind)
        assert [name for name, _ in found] == list(names)
        if kind is not RegionKind.EXPERTS:  # there the solver is asked once an expert
            assert found == tuple((name, SOLVERS[name]) for name in names)


def test_what_a_method_does_not_cut() -> None:
    assert solvers_for("pca", RegionKind.FFN) == ()
    assert solvers_for("obs", RegionKind.RESIDUAL) == ()
    assert all(solvers_for(method, RegionKind.PLAIN) == () for method in METHODS)


def test_auto_cuts_everything_and_can_measure_what_it_sweeps() -> None:
    assert set(METHODS["auto"]) == {*SWEPT, RegionKind.RESIDUAL}
    assert set(CURVES) == set(SWEPT)
    assert len(METHODS["auto"][RegionKind.FFN]) > 1  # of several the better one is taken
