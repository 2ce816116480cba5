"""A checkpoint that no stock model can be: one line and a code of its own, before any work on text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("regions", "why"),
    [("ffn,value", "has a value width of 6 for 8"), ("residual", "layer norms become RMSNorms")],
)
def test_what_no_stock_model_has_is_refused_first(
    tmp_path: Path, model_folder: Callable[[str], Path], here: Callable[..., Any], regions: str, why: str
) -> None:
    out = tmp_path / "out"
    found = here(
        "export", model_folder("gpt2"), out, "--regions", regions, "--uniform", "--checkpoint", "--multiple", 6
    )
    assert (found.code, found.stdout) == (14, "")
    told = found.stderr.splitlines()[-1]
    assert told.startswith("dotresize-fx: --checkpoint: ")
    assert why in told
    assert "--regions ffn" in told
    assert "sensitivity" not in found.stderr
    assert not out.exists()


def test_without_uniform_it_is_said_at_once(tmp_path: Path, here: Callable[..., Any]) -> None:
    found = here("export", "no-such-model", tmp_path / "out", "--checkpoint")
    assert found.code == 2
    assert found.stderr == "dotresize-fx: --checkpoint: a stock model has one width for all layers: say --uniform too\n"
