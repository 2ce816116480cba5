"""Text from what an export wrote, on the command line."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Here = Callable[..., Any]
Exported = Callable[[str], tuple[Path, Any]]
SPEED = r"\d+ tokens; prompt of \d+ in \d+\.\d\d s; then \d+\.\d tokens/s\n"


def test_a_prompt_is_gone_on_with(here: Here, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = exported("llama")
    ended = here("generate", out, "the of and", "--max-tokens", 12, "--threads", 1)
    assert ended.code == 0, ended.stderr
    assert re.fullmatch(SPEED, ended.stderr)
    monkeypatch.setattr("sys.stdin", io.StringIO("the of and"))
    again = here("generate", out, "-", "--max-tokens", 12, "--quiet")
    assert (again.code, again.stderr, again.stdout) == (0, "", ended.stdout)


def test_what_cannot_generate_says_so_in_one_line(here: Here, exported: Exported, tmp_path: Path) -> None:
    for folder, code, said in (
        (exported("bert")[0], 2, "holds an encoder, which generates no text"),
        (tmp_path, 3, "no ONNX model at"),
    ):
        ended = here("generate", folder, "the")
        assert (ended.code, ended.stdout) == (code, "")
        assert ended.stderr.count("\n") == 1
        assert said in ended.stderr
