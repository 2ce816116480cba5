"""Rewrite rules are tried at fewer nodes, and make the same of a model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from onnxscript.rewriter._matcher import SimplePatternMatcher

from dotresize_fx.export import given_program
from dotresize_fx.export.capture import capture
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.rules_by_op import rules_by_op


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_file_is_the_same(
    kind: str, tiny_model: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tried = tiny_model(kind), 0
    begin: Any = SimplePatternMatcher._init_match

    def counted(matcher: Any, verbose: int) -> None:
        nonlocal tried
        tried += 1
        begin(matcher, verbose)

    monkeypatch.setattr(SimplePatternMatcher, "_init_match", counted)

    def emitted(folder: str, rules: Callable[[], AbstractContextManager[None]]) -> tuple[bytes, int]:
        nonlocal tried
        monkeypatch.setattr(given_program, "rules_by_op", rules)
        (tmp_path / folder).mkdir()
        captured, tried = capture(model), 0
        return emit_onnx(model, captured, captured.graph, tmp_path / folder).read_bytes(), tried

    by_op, few = emitted("by op", rules_by_op)
    plain, many = emitted("plain", nullcontext)
    assert by_op == plain
    assert 0 < few < many / 10


def test_it_ends_with_the_block() -> None:
    before = SimplePatternMatcher.match
    with rules_by_op():
        assert SimplePatternMatcher.match is not before
    assert SimplePatternMatcher.match is before
