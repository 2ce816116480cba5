"""Text from what an export wrote, on the command line."""

from __future__ import annotations

import io
import re
import shutil
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


def test_what_is_no_text_or_not_what_was_written(
    here: Here, exported: Exported, text_file: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(exported("llama")[0], tmp_path / "out"))
    ended = here("generate", out, "the \udcff")
    assert (ended.code, ended.stderr) == (2, "dotresize-fx: the prompt is no UTF-8 text: convert it first\n")
    data = bytearray((out / "model.onnx.data").read_bytes())
    data[100] ^= 255
    (out / "model.onnx.data").write_bytes(data)
    for command in (("generate", out, "the"), ("eval", out, "--text", text_file)):
        ended = here(*command)
        assert ended.code == 4
        assert "is not what report.json beside it was written for" in ended.stderr
    (out / "report.json").write_text("{")
    ended = here("generate", out, "the")
    assert ended.code == 2
    assert "is not a report that export wrote" in ended.stderr


def test_what_cannot_generate_says_so_in_one_line(here: Here, exported: Exported, tmp_path: Path) -> None:
    for folder, code, said in (
        (exported("bert")[0], 2, "holds an encoder, which generates no text"),
        (tmp_path, 3, "no ONNX model at"),
    ):
        ended = here("generate", folder, "the")
        assert (ended.code, ended.stdout) == (code, "")
        assert ended.stderr.count("\n") == 1
        assert said in ended.stderr
