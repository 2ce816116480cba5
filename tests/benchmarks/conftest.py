"""The benchmarks' modules, which are no part of the installed package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dotresize_fx.compiler import analyse
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.regions import MatchReport

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """``script(name)`` imports a benchmark by its name."""

    def load(name: str) -> ModuleType:
        sys.path.insert(0, str(BENCHMARKS))
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(str(BENCHMARKS))

    return load


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name in ("calibration-a", "calibration-b", "heldout-c"):
        text = "\n\n".join(f"{name} has paragraph {i} of a few words" for i in range(60))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def analyse_once() -> Callable[..., tuple[Any, FxGraph, MatchReport]]:
    """The compiler's ``analyse``, once for all runs on the same weights; every caller gets a copy of the graph."""
    done: dict[tuple[tuple[str, str], ...], tuple[Any, FxGraph, MatchReport]] = {}

    def get(loaded: Any, progress: Any) -> tuple[Any, FxGraph, MatchReport]:
        key = tuple(sorted(loaded.sha256.items()))
        if key not in done:
            done[key] = analyse(loaded, progress)
        captured, graph, matches = done[key]
        return captured, graph.copy(), matches

    return get


@pytest.fixture
def start(
    script: Callable[[str], ModuleType],
    analyse_once: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[str, str], str]:
    """``start(name, arguments)`` runs a benchmark as from the command line; returns what it printed."""
    monkeypatch.setattr(script("bench"), "analyse", analyse_once)

    def run(name: str, given: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *given.split()])
        script(name).main()
        return capsys.readouterr().out

    return run
