"""Models whose weights stay in their files: the same bytes as others, within a budget, and told before the work."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import dotresize_fx.memory

Folder = Callable[[str], Path]
Here = Callable[..., Any]

MIB = 1 << 20


@pytest.fixture
def tiny_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of tiny models too take too much of any budget; what streams take is another matter."""
    monkeypatch.setattr(dotresize_fx.memory, "WEIGHTS_SHARE", 0.0)


def in_shards(folder: Path, to: Path, count: int = 3) -> Path:
    """A copy of a model whose weights stand in several files, halved in precision."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    names = sorted(weights)
    where = {name: f"model-{i % count}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: weights[name] for name in names if where[name] == file}, to / file, {"format": "pt"})
    (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return to


@pytest.mark.parametrize("streams", [False, True])
def test_a_lazily_slimmed_model_is_the_normally_slimmed_one(
    exported: Callable[[str], tuple[Path, Any]],
    model_folder: Folder,
    few_tokens: list[str],
    here: Here,
    tmp_path: Path,
    tiny_share: None,
    monkeypatch: pytest.MonkeyPatch,
    streams: bool,
) -> None:
    """Byte for byte, its weights in one file or in shards, its activations in memory or in files."""
    normal, _ = exported("llama")
    folder = model_folder("llama")
    if streams:
        monkeypatch.setattr(dotresize_fx.memory, "STREAMS_SHARE", 0.0)
        monkeypatch.setattr("dotresize_fx.fx_form.reading.LEAST_SPOOLED", 1)
        # Two weights: batches wait for one another often.
        monkeypatch.setattr("dotresize_fx.compiler.held_bytes", lambda memory, device: 1 << 14)
        folder = in_shards(folder, tmp_path / "shards")
    out = tmp_path / "out"
    ended = here("export", folder, out, "--ratio", 0.25, "--memory-budget", "2GiB", "--quiet", *few_tokens)
    assert ended.code == 0, ended.stderr
    for name in ("model.onnx", "model.onnx.data", "plan.json", "config.json"):
        assert (out / name).read_bytes() == (normal / name).read_bytes(), name
    assert any("read from the model's files" in note for note in json.loads((out / "report.json").read_text())["notes"])
    assert [path for path in tmp_path.iterdir() if path.name not in ("out", "shards")] == []


def test_repair_reads_what_it_needs(
    model_folder: Folder, few_tokens: list[str], here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes again where each cut sublayer is trained, its activations and the other weights in files."""

    def best(out: Path, *more: object) -> tuple[bool, bytes]:
        options = ["--effort", "best", "--repair-steps", 8, *more]
        ended = here("export", model_folder("llama"), out, "--ratio", 0.25, "--quiet", *options, *few_tokens)
        assert ended.code == 0, ended.stderr
        notes = json.loads((out / "report.json").read_text())["notes"]
        return any("read from the model's files" in note for note in notes), (out / "model.onnx.data").read_bytes()

    lazy, wanted = best(tmp_path / "normal")
    assert not lazy
    monkeypatch.setattr(dotresize_fx.memory, "WEIGHTS_SHARE", 0.0)
    monkeypatch.setattr(dotresize_fx.memory, "STREAMS_SHARE", 0.0)
    monkeypatch.setattr("dotresize_fx.fx_form.reading.LEAST_SPOOLED", 1)
    assert best(tmp_path / "lazy", "--memory-budget", "2GiB") == (True, wanted)


# -- what is wrong with them -----------------------------------------------------------------------


def test_bad_weights_are_found_first_and_told_in_one_line(
    model_folder: Folder, few_tokens: list[str], here: Here, tmp_path: Path, tiny_share: None
) -> None:
    """A shard missing or cut off and a wrong shape before anything is read; NaN in the last layer when it is read."""
    whole = in_shards(model_folder("llama"), tmp_path / "whole")

    def refusal(name: str, spoil: Callable[[Path], None]) -> str:
        spoil(shutil.copytree(whole, folder := tmp_path / name))
        ended = here("export", folder, tmp_path / "out", "--memory-budget", "1GiB", "--quiet", *few_tokens)
        assert ended.code == 4, ended.stderr
        assert ended.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return str(ended.stderr)

    def edited(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
        def edit(folder: Path) -> None:
            file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][key]
            weights = load_file(file)
            save_file({**weights, key: change(weights[key])}, file, {"format": "pt"})

        return edit

    def cut_off(folder: Path) -> None:
        file = folder / "model-2.safetensors"
        file.write_bytes(file.read_bytes()[:-3])

    assert "model-1.safetensors: missing" in refusal("missing", lambda f: (f / "model-1.safetensors").unlink())
    assert "model-2.safetensors: truncated" in refusal("truncated", cut_off)
    table, last = "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"
    assert f"{table} has shape [50, 32]" in refusal("shape", edited(table, lambda w: w[:50].contiguous()))
    assert f"{last} holds NaN or infinity" in refusal("nan", edited(last, lambda w: w * float("nan")))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--memory-budget", "plenty"], "--memory-budget plenty: say a size such as 4GiB or 512MiB"),
        (["--memory-budget", "1MiB"], "at least 64 MiB are needed"),
        (["--memory-budget", "4GiB", "--effort", "heal"], "--memory-budget and --effort heal do not go together"),
    ],
)
def test_what_is_no_budget_is_refused(options: list[str], said: str, here: Here, tmp_path: Path) -> None:
    ended = here("export", tmp_path, tmp_path / "out", *options)
    assert ended.code == 2
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1


# -- told before -----------------------------------------------------------------------------------


def test_a_dry_run_reads_no_weight_and_writes_nothing(
    model_folder: Folder, here: Here, tmp_path: Path, tree: Callable[[Path], dict[str, str]]
) -> None:
    folder = in_shards(model_folder("deep llama"), tmp_path / "model")
    for file in folder.glob("*.safetensors"):
        size = file.stat().st_size
        with file.open("r+b") as stream:
            header = 8 + int.from_bytes(stream.read(8), "little")
            stream.seek(header)
            stream.write(b"\xff" * (size - header))  # NaN, which an export would refuse
    before = tree(tmp_path)
    ended = here("export", folder, tmp_path / "out", "--dry-run", "--ratio", 0.25, "--quiet")
    assert ended.code == 0, ended.stderr
    assert tree(tmp_path) == before
    assert "2 x ffn, 64 wide, permutation" in ended.stdout
    assert re.search(r"--ratio 0.25 would remove 2[0-9]\.\d% of the block weights", ended.stdout)
    assert "measured, on data" in ended.stdout
    assert re.search(r"memory at the peak: about \d+ MiB", ended.stdout)
    assert re.search(r"time: about \d+ s", ended.stdout)


def test_a_dry_run_says_that_a_budget_is_too_small(model_folder: Folder, here: Here, tmp_path: Path) -> None:
    ended = here("export", model_folder("llama"), tmp_path / "out", "--dry-run", "--quiet", "--memory-budget", "64MiB")
    assert ended.code == 0
    assert "--memory-budget 64 MiB is less than that" in ended.stdout


def test_a_dry_run_foretells_repair(model_folder: Folder, here: Here, tmp_path: Path) -> None:
    ended = here("export", model_folder("llama"), tmp_path / "out", "--dry-run", "--quiet", "--effort", "best")
    assert ended.code == 0
    assert "time: about" in ended.stdout


def test_a_dry_run_says_what_it_cannot_foretell(model_folder: Folder, here: Here, tmp_path: Path) -> None:
    for options, said in ((["--effort", "heal"], "--effort heal"), (["--merge", "1"], "--merge")):
        ended = here("export", model_folder("llama"), tmp_path / "out", "--dry-run", *options)
        assert ended.code == 2
        assert said in ended.stderr


# -- the memory of the process ---------------------------------------------------------------------

# Exports a first, tiny model, for what the libraries take, then the one that is asked about; prints the peaks of
# anonymous memory of both. Pages of mapped files are not among it.
CHILD = """
import sys, threading, time
from dotresize_fx.cli import main

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

peak = 0

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
tiny, model, out, *options = sys.argv[1:]
for folder in (tiny, model):
    peak = 0
    try:
        main(["export", folder, f"{out}-{folder == tiny}", *options])
    except SystemExit as ended:
        if ended.code:
            raise
    print("peak", peak)
"""


def write_model(folder: Path, tokenizer: Callable[[Path], Any], layers: int, hidden: int, ffn: int, heads: int) -> int:
    """A Llama of bfloat16 random weights, written block by block; returns what it takes in float32."""
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads // 4, "vocab_size": 300}
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=64, architectures=["LlamaForCausalLM"])
    folder.mkdir()
    config.save_pretrained(folder)
    tokenizer(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in transformers.LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        block = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{block}.safetensors", {})[name] = shape
    for file, inside in shards.items():
        weights = {
            name: torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).bfloat16()
            if len(shape) == 2
            else torch.ones(shape, dtype=torch.bfloat16)
            for name, shape in inside.items()
        }
        save_file(weights, folder / file, {"format": "pt"})
    where = {name: file for file, inside in shards.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sum(shape.numel() for shape in shapes.values()) * 4


def peaks(start: Callable[..., subprocess.Popen[str]], *arguments: object, cwd: Path, minutes: int) -> tuple[int, int]:
    """Of the export of a tiny model and of the other one, in one process."""
    process = start(*arguments, cwd=cwd, python=("-c", CHILD))
    try:
        out, err = process.communicate(timeout=60 * minutes)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert process.returncode == 0, err
    libraries, whole = (int(number) for number in re.findall(r"^peak (\d+)$", out, re.MULTILINE))
    return libraries, whole


BRIEFLY = ["--regions", "ffn", "--no-cache", "--quiet", "--device", "cpu", "--ratio", "0.05"]


@pytest.fixture
def slimmed_within(
    start: Callable[..., subprocess.Popen[str]],
    tiny_tokenizer: Callable[[Path], Any],
    few_tokens: list[str],
    tmp_path: Path,
) -> Callable[..., tuple[int, int]]:
    """``slimmed_within(budget, *sizes, minutes)``: peaks of a tiny model and of one of these sizes (see write_model),
    whose weights take twice the budget of so many MiB.
    """

    def measure(budget: int, *sizes: int, minutes: int) -> tuple[int, int]:
        tiny, big = tmp_path / "tiny", tmp_path / "big"
        write_model(tiny, tiny_tokenizer, 1, 64, 64, 4)
        assert write_model(big, tiny_tokenizer, *sizes) >= 2 * budget * MIB
        command = (tiny, big, tmp_path / "out", "--memory-budget", f"{budget}MiB", *BRIEFLY, *few_tokens)
        return peaks(start, *command, "--calibration-tokens", "512", cwd=tmp_path, minutes=minutes)

    return measure


def test_a_model_of_twice_the_budget_is_slimmed_within_it(slimmed_within: Callable[..., tuple[int, int]]) -> None:
    """On top of what the libraries take, which is more than so small a budget."""
    libraries, whole = slimmed_within(192, 9, 2048, 256, 32, minutes=15)
    assert whole - libraries < 192 * MIB, f"{libraries / MIB:.0f} MiB, then {whole / MIB:.0f} MiB"


@pytest.mark.slow
def test_a_model_of_eight_gib_is_slimmed_within_four(slimmed_within: Callable[..., tuple[int, int]]) -> None:
    """Libraries included. Some 30 GB of disk."""
    _, whole = slimmed_within(4096, 40, 4096, 1024, 64, minutes=180)
    assert whole < 4096 * MIB, f"{whole / MIB:.0f} MiB"
