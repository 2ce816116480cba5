"""The two commands that change nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import dotresize_fx
from dotresize_fx.text import read_text, split_text

Here = Callable[..., Any]
Folder = Callable[[str], Path]


def perplexity(ended: Any) -> float:
    assert (ended.code, ended.stderr) == (0, "")
    found = re.fullmatch(r"perplexity (\d+\.\d+) over \d+ tokens\n", ended.stdout)
    assert found, ended.stdout
    return float(found[1])


def test_model_and_onnx_at_ratio_0_have_one_perplexity(
    here: Here, model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    model = model_folder("llama")  # of one layer: what differs from it is the runtime
    options = {"calibration_tokens": 256, "sequence_length": 32, "evaluation_tokens": 128}
    dotresize_fx.slim(model, ratio=0, calibration=text_file, **options).save(tmp_path / "out")
    command = ["--text", text_file, "--sequence-length", 32, "--tokens", 1024, "--quiet"]
    dense = perplexity(here("eval", model, *command))
    # The same weights in another runtime: float32 rounding only, 1e-3 is what the issue grants.
    assert perplexity(here("eval", tmp_path / "out", *command)) == pytest.approx(dense, rel=1e-3)


def test_perplexity_is_what_transformers_computes(here: Here, model_folder: Folder, text_file: Path) -> None:
    folder = model_folder("gpt2")
    found = perplexity(here("eval", folder, "--text", text_file, "--sequence-length", 64, "--tokens", 320, "--quiet"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text_file.read_text(), add_special_tokens=False).input_ids)
    available = len(ids) // 64
    chunks = ids[: available * 64].view(available, 64)[[i * available // 5 for i in range(5)]]
    with torch.no_grad():
        losses = [float(model(chunk[None], labels=chunk[None]).loss) for chunk in chunks]
    # Printed with four decimals; both sum float32 log-likelihoods.
    assert found == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-5)


def test_the_slim_onnx_has_the_perplexity_that_the_report_states(
    here: Here, exported: Callable[[str], Any], text_file: Path, tmp_path: Path
) -> None:
    out, _ = exported("deep llama")
    before = sorted((file.name, file.stat().st_mtime_ns) for file in out.iterdir())
    (tmp_path / "held-out.txt").write_text(split_text(read_text([text_file]))[1], encoding="utf-8")
    held_out = ["--text", tmp_path / "held-out.txt", "--sequence-length", 32, "--tokens", 512, "--quiet"]
    (reported,) = json.loads((out / "report.json").read_text())["figures"]["fidelity"]
    # The report measured the slim program, eval runs the ONNX.
    assert perplexity(here("eval", out, *held_out)) == pytest.approx(reported["slim_perplexity"], rel=1e-3)
    assert sorted((file.name, file.stat().st_mtime_ns) for file in out.iterdir()) == before


def test_an_encoder_has_no_perplexity(
    here: Here, model_folder: Folder, exported: Callable[[str], Any], text_file: Path
) -> None:
    for folder in (model_folder("bert"), exported("bert")[0]):
        ended = here("eval", folder, "--text", text_file, "--quiet")
        assert (ended.code, ended.stdout) == (2, "")
        assert re.fullmatch(r"dotresize-fx: .* encoder, which has no perplexity: .*cosine.*\n", ended.stderr)


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--sequence-length", "1"], "--sequence-length is 1"), (["--tokens", "0"], "--tokens is 0")],
)
def test_lengths_that_cannot_be_used(
    here: Here, model_folder: Folder, text_file: Path, options: list[str], said: str
) -> None:
    ended = here("eval", model_folder("llama"), "--text", text_file, *options)
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"dotresize-fx: {said}: it must be at least")
    assert ended.stderr.count("\n") == 1


def test_a_length_beyond_the_models(
    here: Here, model_folder: Folder, exported: Callable[..., Any], text_file: Path
) -> None:
    for model in (model_folder("llama"), exported("deep llama")[0]):
        ended = here("eval", model, "--text", text_file, "--sequence-length", 65, "--quiet")
        assert (ended.code, ended.stdout) == (2, "")
        assert ended.stderr == (
            "dotresize-fx: --sequence-length is 65, and the model takes 64 tokens at most: choose one up to 64\n"
        )


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_inspect_lists_every_linear(here: Here, model_folder: Folder, kind: str) -> None:
    ended = here("inspect", model_folder(kind), "--quiet")
    assert (ended.code, ended.stderr) == (0, "")
    auto = transformers.AutoModelForCausalLM if kind == "llama" else transformers.AutoModel
    model = auto.from_pretrained(model_folder(kind))
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    listed = re.findall(r"^  (\S+)\.weight +\d+ x \d+ ", ended.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(linears)
    # Whatever is not matched has a reason below.
    numbers = set(re.findall(r"\((\d+)\)", ended.stdout.partition("left alone because")[0]))
    reasons = dict(re.findall(r"^  \((\d+)\) (.+)$", ended.stdout, re.MULTILINE))
    assert numbers == set(reasons)
    assert ("post-norm" in ended.stdout) == (kind == "bert")


def test_a_reader_that_goes_away_is_no_error(start: Callable[..., Any], model_folder: Folder, tmp_path: Path) -> None:
    """``| head`` that is gone before the first line; progress that nobody reads does not stop the work either."""
    process = start("--help", cwd=tmp_path)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
    process.stderr.close()
    process = start("inspect", model_folder("llama"), cwd=tmp_path)
    process.stderr.close()
    assert "lm_head.weight" in process.stdout.read()
    assert process.wait() == 0
    process.stdout.close()
