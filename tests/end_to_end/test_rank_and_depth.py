"""Linears of a lower rank and fewer blocks, as seen from outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest


def report_of(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return content


def test_linears_of_a_lower_rank(
    tmp_path: Path, model_folder: Callable[[str], Path], few_tokens: list[str], here: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    done = here("export", model_folder("deep llama"), out, "--method", "rom", "--ratio", 0.2, *few_tokens, "--quiet")
    assert (done.code, done.stderr) == (0, "")
    report = report_of(out)
    assert report["summary"]["verified"] is True
    assert any(note.startswith("7 linears are two of a lower rank now") for note in report["notes"])
    assert report["figures"]["slim"]["block_linear_weights"] <= 0.8 * report["figures"]["dense"]["block_linear_weights"]


@pytest.mark.parametrize("method", ["mka", "aligned"])
def test_a_block_less(
    tmp_path: Path, model_folder: Callable[[str], Path], few_tokens: list[str], here: Callable[..., Any], method: str
) -> None:
    out = tmp_path / "out"
    command = ["export", model_folder("deep llama"), out, "--merge", 1, "--merge-method", method, *few_tokens]
    done = here(*command, "--quiet")
    assert (done.code, done.stderr) == (0, "")
    report = report_of(out)
    assert report["summary"]["verified"] is True
    assert any(note.startswith(f"{method}: 1 blocks went, 50.0% of the block weights") for note in report["notes"])
    inputs = [one.name for one in onnx.load(out / "model.onnx", load_external_data=False).graph.input]
    assert [name for name in inputs if name.startswith("past")] == [
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--merge", 2], "the model has 2 blocks, of which one at least has to stay"),
        (["--merge", 0], "at least one block has to go"),
        (["--merge", 1, "--ratio", 0.2], "--ratio cannot be given beside it"),
        (["--merge", 1, "--merge-method", "best"], "choose one of mka, aligned, drop-last, drop-least"),
        (["--merge-method", "mka"], "say with --merge how many"),
        (["--merge", 1, "--method", "rom"], "--merge and --method rom do not go together"),
        (["--method", "rom", "--checkpoint", "--uniform"], "--method rom and --uniform do not go together"),
        (["--method", "rom", "--regions", "ffn"], "--method rom and --regions ffn do not go together"),
    ],
)
def test_bad_input(
    tmp_path: Path,
    model_folder: Callable[[str], Path],
    few_tokens: list[str],
    here: Callable[..., Any],
    given: list[Any],
    said: str,
) -> None:
    done = here("export", model_folder("deep llama"), tmp_path / "out", *given, *few_tokens, "--quiet")
    assert done.code == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_layers_that_share_their_weights(
    tmp_path: Path, model_folder: Callable[[str], Path], few_tokens: list[str], here: Callable[..., Any]
) -> None:
    done = here("export", model_folder("albert"), tmp_path / "out", "--merge", 1, *few_tokens, "--quiet")
    assert done.code == 6
    assert "blocks share one set of weights" in done.stderr
