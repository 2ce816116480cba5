"""The list of solvers."""

from __future__ import annotations

import pytest

from dotresize_fx.errors import UsageError
from dotresize_fx.solvers import SOLVERS, solver


def test_solvers_are_found_by_name() -> None:
    assert {"dotresize", "magnitude", "pca"} <= set(SOLVERS)
    assert all(solver(name) is found for name, found in SOLVERS.items())


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"unknown method 'dot': choose one of .*magnitude.*"):
        solver("dot")
