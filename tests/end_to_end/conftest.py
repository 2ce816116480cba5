"""What the end-to-end tests share: tiny models on disk, a text, and the command line in and out of this process.

Models, texts and finished exports are made once a run and never written to by a test.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dotresize_fx.cli import main
from dotresize_fx.export.quiet import quiet_libraries

# One layer where a second one shows nothing more: tracing and conversion are what takes time.
SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64}
# So little text that no part of an export but capture and conversion takes time.
FEW_TOKENS = ["--calibration-tokens", "2048", "--sequence-length", "32", "--evaluation-tokens", "512"]
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they"
WORDS += " which one you were all her she there would their we him been has when who will no more if out so said what"


def _make(kind: str) -> Any:
    if kind in ("llama", "deep llama"):
        sizes = SIZES | {"num_hidden_layers": 2 if kind == "deep llama" else 1}
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True)
        return transformers.LlamaForCausalLM(config)
    if kind == "wide llama":  # whose FFN takes most of its time
        sizes = SIZES | {"hidden_size": 64, "intermediate_size": 2048}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2))
    if kind == "gpt2":
        ids = {"bos_token_id": 1, "eos_token_id": 2}
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=4, **ids)
        )
    if kind == "mixtral":
        return transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
        )
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**SIZES))
    if kind == "albert":
        sizes = SIZES | {"num_hidden_layers": 2, "embedding_size": 16}
        return transformers.AlbertModel(transformers.AlbertConfig(**sizes))
    if kind == "funnel":
        return transformers.FunnelModel(
            transformers.FunnelConfig(vocab_size=300, block_sizes=[1], d_model=32, n_head=4, d_head=8, d_inner=64)
        )
    raise ValueError(kind)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what several tests read."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def model_folder(shared: Path, tiny_tokenizer: Callable[[Path], Any]) -> Callable[[str], Path]:
    """``model_folder(kind)``: a saved tiny model of random weights, with a tokenizer; not to be changed."""

    def get(kind: str) -> Path:
        folder = shared / kind
        if not folder.exists():
            generator = torch.Generator().manual_seed(0)
            model = _make(kind)
            with torch.no_grad(), quiet_libraries():
                for parameter in model.parameters():
                    if parameter.ndim == 2:  # larger than the initial ones: a model with opinions
                        parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
                model.save_pretrained(folder)
                tiny_tokenizer(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def text_file(shared: Path) -> Path:
    """Paragraphs of random words, 12 000 tokens of the tiny tokenizer."""
    generator = random.Random(0)
    paragraphs = [" ".join(generator.choices(WORDS.split(), k=generator.randint(8, 40))) for _ in range(120)]
    file = shared / "text.txt"
    file.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def few_tokens(text_file: Path) -> list[str]:
    """Options that keep an export short."""
    return ["--calibration", str(text_file), *FEW_TOKENS]


# -- the command line ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """What a command left: its exit code and streams."""

    code: int
    stdout: str
    stderr: str


def environment() -> dict[str, str]:
    """This process's, but no source folder may shadow the installed package, and streams are buffered as usual."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**kept, "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8"}


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """``start(*arguments, cwd, python=("-m", "dotresize_fx"))``: the command line in a process group of its own."""

    def begin(*arguments: object, cwd: Path, python: tuple[str, ...] = ("-m", "dotresize_fx")) -> subprocess.Popen[str]:
        # A shell that runs tests in the background has them ignore Ctrl-C, nohup a hang-up; children would inherit it.
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
        before = {number: signal.signal(number, handler) for number, handler in usual.items()}
        try:
            return subprocess.Popen(
                [sys.executable, *python, *map(str, arguments)],
                cwd=cwd,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    return begin


@pytest.fixture(scope="session")
def cli(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., Ended]:
    """``cli(*arguments, cwd, python=...)``: run the command line in a process of its own until it ends."""

    def run(*arguments: object, **where: Any) -> Ended:
        process = start(*arguments, **where)
        try:
            out, err = process.communicate(timeout=300)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        return Ended(process.returncode, out, err)

    return run


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """``here(*arguments)``: the command line in this process, which saves the start of another one."""

    def run(*arguments: object) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, *capfd.readouterr())

    return run


def _in_this_process(command: Sequence[object]) -> Ended:
    """As ``here``, for what outlives a test; what libraries write past ``sys`` is not caught."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in command])
        assert isinstance(ended.value.code, int)
    return Ended(ended.value.code, out.getvalue(), err.getvalue())


@dataclass
class _Exports:
    done: dict[str, Ended] = field(default_factory=dict)


@pytest.fixture(scope="session")
def _exports() -> _Exports:
    return _Exports()


@pytest.fixture
def exported(
    _exports: _Exports,
    shared: Path,
    model_folder: Callable[[str], Path],
    few_tokens: list[str],
    cli: Callable[..., Ended],
) -> Callable[[str], tuple[Path, Ended]]:
    """``exported(kind)``: (OUT, how the command ended) of one real export at ratio 0.25, made once a run.

    That of ``deep llama`` had a process of its own.
    """

    def get(kind: str) -> tuple[Path, Ended]:
        out = shared / "out" / kind
        if kind not in _exports.done:
            command = ["export", model_folder(kind), out, "--ratio", 0.25, *few_tokens]
            if kind == "deep llama":
                (cwd := shared / "empty").mkdir(exist_ok=True)
                _exports.done[kind] = cli(*command, cwd=cwd)
            else:
                _exports.done[kind] = _in_this_process(command)
        return out, _exports.done[kind]

    return get


# -- what is left behind ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, str]]:
    """``tree(folder)``: every path below it, hidden ones too, with a hash of its content."""

    def listing(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in sorted(folder.rglob("*"))
        }

    return listing
