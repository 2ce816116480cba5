"""A fused graph that computes something else is no reason to deliver nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

import dotresize_fx
from dotresize_fx.errors import VerificationError
from dotresize_fx.export import verified_onnx
from dotresize_fx.export.verified_onnx import write_verified
from dotresize_fx.slim_result import SlimResult


@pytest.fixture
def slimmed(save_tiny_model: Any, tmp_path: Path) -> SlimResult:
    folder = save_tiny_model(tmp_path / "model")
    few = {"calibration_tokens": 256, "sequence_length": 32, "evaluation_tokens": 64}
    return dotresize_fx.slim(str(folder), 0.2, target="cpu", **few)


def spoil(monkeypatch: pytest.MonkeyPatch, targets: set[str]) -> None:
    """Make all that is emitted for these targets put out its logits' negative."""
    really = verified_onnx.emit_onnx

    def spoilt(model: Any, captured: Any, graph: Any, folder: Path, target: str = "any") -> Path:
        path = really(model, captured, graph, folder, target)
        if target in targets:
            proto = onnx.load(path)
            logits = proto.graph.output[0].name
            last = next(node for node in proto.graph.node if logits in node.output)
            last.output[list(last.output).index(logits)] = "before"
            proto.graph.node.append(onnx.helper.make_node("Neg", ["before"], [logits]))
            onnx.save(proto, path)
        return path

    monkeypatch.setattr(verified_onnx, "emit_onnx", spoilt)


def test_standard_ops_stand_in(slimmed: SlimResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert write_verified(slimmed, tmp_path, tmp_path).target == "cpu"
    spoil(monkeypatch, {"cpu"})
    found = write_verified(slimmed, tmp_path, tmp_path)
    assert found.target == "any"
    assert found.verification.passed
    assert [note for note in found.notes if "--target cpu: the ONNX holds standard ops, since fused (" in note]
    assert not {node.domain for node in onnx.load(found.path, load_external_data=False).graph.node} - {""}


def test_standard_ops_that_are_wrong_are_not_delivered(
    slimmed: SlimResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {"cpu", "any"})
    with pytest.raises(VerificationError, match="differs from the slim program"):
        write_verified(slimmed, tmp_path, tmp_path)
