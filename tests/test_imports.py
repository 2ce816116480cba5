"""Imports go one way: passes and export use the core, of which only the compiler and the command line know them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KNOWN = {"compiler.py", "slim_on_device.py", "slim_result.py", "cli.py"}
OUTWARDS = re.compile(r"^\s*(?:from|import) dotresize_fx\.(?:passes|export)\b", re.MULTILINE)
UPWARDS = re.compile(r"^\s*(?:from|import) dotresize_fx\.export\b", re.MULTILINE)


@pytest.mark.parametrize(("folder", "forbidden"), [("dotresize_fx", OUTWARDS), ("passes", UPWARDS)])
def test_the_core_knows_nothing_of_what_uses_it(folder: str, forbidden: re.Pattern[str]) -> None:
    files = {file for file in (ROOT / folder).rglob("*.py") if file.name not in KNOWN}
    assert len(files) > 20
    assert not [file.name for file in files if forbidden.search(file.read_text(encoding="utf-8"))]
