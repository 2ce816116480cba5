"""Linears of a lower rank and fewer blocks, as seen from outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import transformers

# As short as healing is.
HEALED = ["--effort", "heal", "--heal-steps", 2]


def report_of(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return content


def test_linears_of_a_lower_rank(
    tmp_path: Path, model_folder: Callable[[str], Path], few_tokens: list[str], here: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    command = ["export", model_folder("deep llama"), out, "--method", "rom", "--ratio", 0.2, *few_tokens, *HEALED]
    done = here(*command, "--target", "cpu", "--quantize", "int8", "--format", "pt2", "--quiet")
    assert (done.code, done.stderr) == (0, "")
    report = report_of(out)
    assert report["summary"]["verified"] is True
    assert [row["format"] for row in report["figures"]["formats"]] == ["pt2"]
    assert any(note.startswith("healed for 2 steps") for note in report["notes"])
    assert any(note.startswith("7 linears are two of a lower rank now") for note in report["notes"])
    ranks = {row["name"]: (row["d_in"], row["d_out"]) for row in report["low_rank_linears"]}
    assert (len(ranks), ranks["model.layers.1.mlp.down_proj"]) == (7, (64, 32))
    assert all(row["rank"] < min(row["d_in"], row["d_out"]) for row in report["low_rank_linears"])
    assert report["removed_blocks"] == []
    assert "7 linears of a lower rank; 0 of" in done.stdout
    assert "Linears of a lower rank" in (out / "report.html").read_text(encoding="utf-8")
    assert report["figures"]["slim"]["block_linear_weights"] <= 0.8 * report["figures"]["dense"]["block_linear_weights"]


def test_a_block_less(
    tmp_path: Path, model_folder: Callable[[str], Path], few_tokens: list[str], here: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    command = ["export", model_folder("deep llama"), out, "--merge", 1, "--merge-method", "aligned", *few_tokens]
    done = here(*command, *HEALED, "--repair-steps", 2, "--checkpoint", "--format", "pt2", "--quiet")
    assert (done.code, done.stderr) == (0, "")
    report = report_of(out)
    assert report["summary"]["verified"] is True
    for said in ("aligned: 1 block went, 50.0% of the block weights", "2 sublayers refitted", "healed for 2 steps"):
        assert any(note.startswith(said) for note in report["notes"])
    (block,) = report["removed_blocks"]
    assert (block["index"], block["name"], block["merged_into"]) == (0, "model.layers.0", 1)
    assert 0 < block["alpha"] < 1
    assert not any("layers.0" in row["name"] for row in report["regions"])
    assert "1 block went; 0 of" in done.stdout
    assert f"top-1 agreement {100 * report['figures']['fidelity'][0]['top1_agreement']:.1f} %" in " ".join(
        done.stdout.split()
    )
    assert [row["format"] for row in report["figures"]["formats"]] == ["pt2"]
    inputs = [one.name for one in onnx.load(out / "model.onnx", load_external_data=False).graph.input]
    assert [name for name in inputs if name.startswith("past")] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"] == 1
    checkpoint = report["figures"]["checkpoint"]
    assert checkpoint["config_changes"] == {"num_hidden_layers": [2, 1]}
    assert 0 < checkpoint["tokens_equal"] <= checkpoint["tokens_generated"]
    assert transformers.AutoModelForCausalLM.from_pretrained(out / "checkpoint").config.num_hidden_layers == 1
    generated = here("generate", out, "the of", "--max-tokens", 4, "--quiet")
    assert generated.code == 0


def test_more_blocks_than_there_are(
    tmp_path: Path, model_folder: Callable[[str], Path], few_tokens: list[str], here: Callable[..., Any]
) -> None:
    done = here("export", model_folder("deep llama"), tmp_path / "out", "--merge", 2, *few_tokens)
    assert done.code == 2
    *stages, said = done.stderr.strip().splitlines()
    assert said == "dotresize-fx: --merge 2: the model has 2 blocks, of which one at least has to stay"
    assert [line.split()[0] for line in stages] == ["load"]  # before it is captured
    assert not (tmp_path / "out").exists()


def test_layers_that_share_their_weights(
    tmp_path: Path, model_folder: Callable[[str], Path], few_tokens: list[str], here: Callable[..., Any]
) -> None:
    done = here("export", model_folder("albert"), tmp_path / "out", "--merge", 1, *few_tokens, "--quiet")
    assert done.code == 6
    assert "blocks share one set of weights" in done.stderr
