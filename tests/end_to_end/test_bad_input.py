"""Every mistake a user can make: one clear line, an exit code of its own kind, and nothing left behind (but what a full
disk's next run goes on from).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Folder = Callable[[str], Path]
Refused = Callable[..., str]


@pytest.fixture
def refused(here: Callable[..., Any], tree: Callable[[Path], dict[str, str]], tmp_path: Path) -> Refused:
    """``refused(code, *arguments)``: run it, see that it ends as it should, and return what it said.

    ``tmp_path``, where OUT is to be, must look afterwards as it did before, hidden folders included.
    """

    def run(code: int, *arguments: object) -> str:
        before = tree(tmp_path)
        ended = here(*arguments)
        assert ended.code == code, ended.stderr
        assert ended.stdout == ""
        assert ended.stderr.startswith("dotresize-fx: ")
        assert ended.stderr.count("\n") == 1
        assert ended.stderr.endswith("\n")
        assert "Traceback" not in ended.stderr
        assert tree(tmp_path) == before
        return str(ended.stderr)

    return run


@pytest.fixture
def export(refused: Refused, few_tokens: list[str], tmp_path: Path) -> Refused:
    """``export(code, model, *options)`` is refused; OUT is tmp_path/new/out."""

    def run(code: int, model: object, *options: object) -> str:
        return refused(code, "export", model, tmp_path / "new" / "out", "--quiet", *few_tokens, *options)

    return run


@pytest.fixture
def copied(model_folder: Folder, tmp_path: Path) -> Path:
    """A tiny Llama that a test may spoil."""
    return shutil.copytree(model_folder("llama"), tmp_path / "spoilt")


# -- the command line itself -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ratio", "-0.1"], "--ratio is -0.1: it is a share, at least 0 and below 1"),
        (["--ratio", "1"], "--ratio is 1.0: it is a share"),
        (["--ratio", "nan"], "--ratio is nan: it is a share"),
        (["--ratio", "much"], "argument --ratio: invalid float value: 'much' (see `dotresize-fx export --help`)"),
        (
            ["--regions", "nonsense"],
            "--regions nonsense: choose from ffn, attention, value, query_key, ",
        ),
        (["--effort", "utmost"], "--effort utmost: choose one of best, fast, heal"),
        (["--regions", "ffn,ffn"], "--regions ffn,ffn: names one twice"),
        (["--method", "magic"], "--method magic: choose one of auto, dotresize, magnitude, "),
        (["--method", "pca"], "--method pca does not cut what is cut by default: choose --regions from residual"),
        (["--sequence-length", "1"], "--sequence-length is 1: it must be at least 2"),
        (["--multiple", "0"], "--multiple is 0: it must be at least 1"),
        (["--cost", "watts"], "--cost watts: choose one of macs, weights"),
        (["--head-sizes", "equal", "--regions", "value"], "--regions value: --head-sizes equal cuts query_key and"),
        (["--plan", "plan.json", "--ratio", "0.2"], "--plan says all widths, so --ratio cannot be given beside it: "),
        (["--plan", "plan.json", "--regions", "ffn", "--multiple", "8"], "so --regions, --multiple cannot be given"),
        (["--seed", "-1"], "--seed is -1: it must be at least 0"),
        (["--unknown"], "unrecognized arguments: --unknown (see `dotresize-fx export --help`)"),
    ],
)
def test_options_that_cannot_be_used(export: Refused, tmp_path: Path, options: list[str], said: str) -> None:
    """Said before the model is looked for, let alone loaded."""
    assert said in export(2, tmp_path / "no model", *options)


@pytest.mark.parametrize("arguments", [[], ["export"], ["export", "model"], ["frobnicate"], ["eval", "model"]])
def test_commands_that_are_none(refused: Refused, arguments: list[str]) -> None:
    assert "--help`)" in refused(2, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is to be missing")
def test_a_device_that_is_not_there(export: Refused, tmp_path: Path) -> None:
    assert "use --device cpu" in export(2, tmp_path / "no model", "--device", "cuda")


# -- models ----------------------------------------------------------------------------------------


def test_a_model_that_is_none(export: Refused, refused: Refused, tmp_path: Path, text_file: Path) -> None:
    assert "no such folder or file" in export(3, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "not a model, it holds no config.json" in export(3, tmp_path / "empty")
    assert "not a model: give a Hugging Face folder or a .gguf file" in export(3, text_file)
    assert "no such folder or file" in refused(3, "inspect", tmp_path / "absent", "--quiet")
    assert "no such folder or file" in refused(3, "eval", tmp_path / "absent", "--text", text_file, "--quiet")


def test_truncated_weights(export: Refused, refused: Refused, copied: Path, text_file: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert str(copied) in export(4, copied)
    refused(4, "inspect", copied, "--quiet")
    refused(4, "eval", copied, "--text", text_file, "--quiet")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(export: Refused, copied: Path, value: float) -> None:
    weights = load_file(copied / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.0.mlp.up_proj.weight holds NaN or infinity" in export(4, copied)


def test_weights_that_are_missing_or_of_another_shape(export: Refused, copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert "lacks model.layers.0.mlp.up_proj.weight" in export(4, copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    assert "the configuration says" in export(4, copied)


def test_a_model_without_tokenizer(export: Refused, copied: Path) -> None:
    for file in copied.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in export(2, copied)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "no tokenizer that can be read, which text needs (no tokenizer could be loaded: "),
        (["--sequence-length", "65"], "--sequence-length is 65, and the model takes 64 tokens at most"),
        (["--plan", "plan.json"], "--plan names 'model.layers.7.mlp', which is no width of this model"),
    ],
)
def test_what_is_said_before_the_long_work(
    export: Refused, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    """A damaged tokenizer and a length too long before capture, a plan of another model before calibration."""

    def too_late(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(
        "dotresize_fx.compiler.prepare_data" if "--plan" in options else "dotresize_fx.compiler.analyse", too_late
    )
    if not options:
        (copied / "tokenizer.json").write_text('{"version": ')
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"schema_version": 1, "widths": {"model.layers.7.mlp": 8}}))
    assert said in export(2, copied, *(plan if option == plan.name else option for option in options))


def test_a_model_that_torch_export_refuses(export: Refused, model_folder: Folder) -> None:
    """Funnel computes with the length as a number, so a program of it would serve one length only."""
    said = export(5, model_folder("funnel"))
    assert "FunnelModel" in said
    assert "Constraints violated (length)!" in said
    assert "your code specialized it to be a constant" in said  # the words of torch


def test_a_model_in_which_nothing_can_be_cut(export: Refused, model_folder: Folder) -> None:
    """ALBERT's layers share their weights."""
    assert "can be cut: its weights are shared by several layers" in export(6, model_folder("albert"))


def test_a_stream_that_cannot_be_cut(export: Refused, model_folder: Folder) -> None:
    said = export(6, model_folder("bert"), "--regions", "residual")
    assert "the residual stream cannot be cut: post-norm" in said
    assert "use --basis sublayer or --regions ffn" in said


def test_a_ratio_at_which_a_region_would_vanish(export: Refused, model_folder: Folder) -> None:
    assert "--ratio 0.99 would make a region vanish" in export(6, model_folder("llama"), "--ratio", "0.99")


# -- texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "empty.txt: holds no text"),
        ("blank.txt", b" \n\n ", "blank.txt: holds no text"),
        ("latin1.txt", "caf\u00e9 ".encode("latin-1") * 99, "latin1.txt: not UTF-8 at byte 3: convert the file"),
        ("words.pdf", b"words " * 99, "words.pdf: text must be a .txt or .jsonl file"),
        ("words.jsonl", b'{"text": "good"}\n{"txet": "bad"}\n', "words.jsonl, line 2: must be a JSON object"),
        ("absent.txt", None, "absent.txt: cannot be read: No such file or directory"),
        ("one.txt", b"x", "too few to split: give more text"),
    ],
)
def test_texts_that_cannot_be_used(
    export: Refused, refused: Refused, tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    """Said before the model is looked for; one bad file among good ones is enough."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert said in export(7, tmp_path / "no model", "--calibration", tmp_path / name)
    if "split" not in said:
        assert said in refused(7, "eval", tmp_path / "no model", "--text", tmp_path / name, "--quiet")


def test_a_text_that_is_too_short(refused: Refused, model_folder: Folder, tmp_path: Path) -> None:
    """A token a character here; which part is too short is told, for the longer one may well do."""
    out, short, medium = tmp_path / "out", tmp_path / "short.txt", tmp_path / "medium.txt"
    short.write_text("few words " * 4)
    medium.write_text("few words " * 20)
    command = ["export", model_folder("llama"), out, "--sequence-length", "32", "--quiet", "--calibration"]
    said = refused(7, *command, short)
    assert "short.txt, the first 80 %, which calibrates: the text has" in said
    assert "64 are needed (2 chunks of 32): give more text" in said
    assert "medium.txt, the last 20 %, which measures: the text has" in refused(7, *command, medium)
    assert "64 are needed" in refused(7, "eval", model_folder("llama"), "--text", short, *command[3:6])


# -- places to write -------------------------------------------------------------------------------


def test_an_out_that_is_in_use(refused: Refused, few_tokens: list[str], tmp_path: Path) -> None:
    """Said before the model is looked for."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    command = ["export", tmp_path / "no model", tmp_path / "out", *few_tokens]
    assert "exists and is not empty: choose another folder or pass --force" in refused(8, *command)
    assert "no report.json, so it is not an earlier output: --force leaves it alone" in refused(8, *command, "--force")
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(8, "export", tmp_path / "no model", tmp_path / "file", *few_tokens)


def test_an_earlier_output_survives_a_failed_replacement(
    refused: Refused, few_tokens: list[str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("{}")
    refused(3, "export", tmp_path / "no model", tmp_path / "out", "--quiet", "--force", *few_tokens)


@contextmanager
def files_of_at_most(room: int) -> Iterator[None]:
    """A file of more bytes is told as a full disk is."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_disk_too_full_for_a_finished_sublayer(export: Refused, model_folder: Folder) -> None:
    model = model_folder("llama")
    with files_of_at_most(4_000):
        said = export(8, model)
    assert said.startswith("dotresize-fx: the disk is full: no room for ")
    assert said.endswith("; free some space and run again\n")


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_disk_too_full_for_the_model(
    here: Callable[..., Any],
    model_folder: Folder,
    few_tokens: list[str],
    tree: Callable[[Path], dict[str, str]],
    tmp_path: Path,
) -> None:
    """The finished sublayer is kept and nothing else is; with room the same command goes on behind it."""
    command = ("export", model_folder("llama"), tmp_path / "new" / "out", *few_tokens)
    with files_of_at_most(55_000):
        ended = here(*command, "--quiet")
    assert (ended.code, ended.stdout, ended.stderr.count("\n")) == (8, "", 1)
    (work,) = (tmp_path / "new").iterdir()
    assert work.name.startswith(".out.work-")
    assert len(list((work / "journal").glob("*.safetensors"))) == 1
    assert {Path(name).name for name in tree(work) if not name.endswith(".safetensors")} == {
        *("lock", "journal", "export.json", "plan.json", "00001.json")
    }
    assert ended.stderr == (
        f"dotresize-fx: the disk is full: no room for {tmp_path / 'new' / 'out'}; free some space and run again; "
        f"the same command goes on behind 1 finished sublayer, kept in {work / 'journal'}\n"
    )
    ended = here(*command)
    assert ended.code == 0, ended.stderr
    assert "goes on behind 1 sublayer of an earlier run" in ended.stderr
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["out"]


# -- what is not installed -------------------------------------------------------------------------

WITHOUT = """
import runpy, site, sys
site.addsitedir(sys.argv.pop(1))
sys.argv[0] = "dotresize-fx"
runpy.run_module("dotresize_fx", run_name="__main__")
"""


def test_a_missing_onnx_runtime(
    cli: Callable[..., Any], model_folder: Folder, few_tokens: list[str], tmp_path: Path
) -> None:
    """A second site folder with everything that is installed but ONNX Runtime; said before anything is captured."""
    (site := tmp_path / "site").mkdir()
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in os.scandir(folder):
            if not entry.name.lower().startswith("onnxruntime"):
                (site / entry.name).symlink_to(entry.path)
    (cwd := tmp_path / "cwd").mkdir()
    python = ("-S", "-c", WITHOUT, str(site))
    ended = cli("export", model_folder("llama"), cwd / "out", *few_tokens, cwd=cwd, python=python)
    assert (ended.code, ended.stdout) == (9, "")
    assert ended.stderr == "dotresize-fx: ONNX Runtime is not installed; run: pip install 'dotresize-fx[cpu]'\n"
    assert list(cwd.iterdir()) == []
