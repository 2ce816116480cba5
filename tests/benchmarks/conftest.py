"""The benchmarks' modules, which are no part of the installed package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

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


@pytest.fixture
def start(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, str], str]:
    """``start(name, arguments)`` runs a benchmark as from the command line; returns what it printed."""

    def run(name: str, given: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *given.split()])
        script(name).main()
        return capsys.readouterr().out

    return run
