"""What ``eval`` measures: a loaded model, or the ONNX that an export wrote, as a function from ids to logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dotresize_fx.errors import UsageError
from dotresize_fx.export.check_text import check_length, check_tokenizer
from dotresize_fx.export.model_source import load_model
from dotresize_fx.export.onnx_file import ONNX_FILE, read_onnx, task_of
from dotresize_fx.export.onnx_session import OnnxModel
from dotresize_fx.export.program_file import is_program_file
from dotresize_fx.fidelity import Inputs, Run, perplexity
from dotresize_fx.options import SEQUENCE_LENGTH
from dotresize_fx.progress import Progress
from dotresize_fx.task import reads_text
from dotresize_fx.text import read_text, token_batches

DEFAULT_LONGEST = 2048


@dataclass(frozen=True)
class Decoder:
    """``run`` maps int64 input_ids and attention_mask (batch, length) to logits (batch, length, vocabulary)."""

    run: Run
    tokenizer: Any
    longest: int


def open_decoder(name: str, *, trust_remote_code: bool = False) -> Decoder:
    """A decoder by any name that ``export`` takes, or a folder that it wrote.

    Raises:
        UsageError: the model is an encoder, which has no perplexity, or has no tokenizer.
    """
    if (Path(name) / ONNX_FILE).is_file():
        return _open_exported(Path(name))
    if is_program_file(name):
        raise UsageError(f"{name} is a program, which reads no text: export's report compares it with its slim self")
    loaded = load_model(name, trust_remote_code=trust_remote_code)
    if loaded.task == "encoder":
        raise UsageError(f"{name} is an encoder, which has no perplexity: export's report gives its cosine instead")
    check_tokenizer(loaded)

    @torch.no_grad()
    def run(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = loaded.model(**batch)[0]
        return logits

    return Decoder(run, loaded.tokenizer, _longest(loaded.config))


def _open_exported(folder: Path) -> Decoder:
    from transformers import AutoConfig, AutoTokenizer

    task = task_of(folder)
    read_onnx(folder / ONNX_FILE)
    model = OnnxModel(folder / ONNX_FILE)
    if not reads_text(task):
        raise UsageError(f"{folder} holds a module that reads no text: its report.json compares it with the dense one")
    if task == "encoder" or model.output_names[0] != "logits":
        raise UsageError(
            f"{folder} holds an encoder, which has no perplexity: its report.json gives the cosine instead"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} has no readable tokenizer and config: {str(error).splitlines()[0]}") from error

    def run(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.from_numpy(model(model.at_start({key: value.numpy() for key, value in batch.items()}))[0])

    return Decoder(run, tokenizer, _longest(config))


def evaluate(
    name: str,
    files: Sequence[Path],
    *,
    sequence_length: int,
    tokens: int | None,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[float, int]:
    """(perplexity, predicted tokens) of a model, or of an exported folder's ONNX in ONNX Runtime.

    Raises:
        UsageError: lengths that cannot be used, or what :func:`open_decoder` says.
        TextError: the text cannot be used or is too short.
    """
    if sequence_length < 2:
        raise UsageError(f"--sequence-length is {sequence_length}: it must be at least 2, to predict a next token")
    if tokens is not None and tokens < 1:
        raise UsageError(f"--tokens is {tokens}: it must be at least 1")
    text = read_text(files)
    with progress.stage("load"):
        decoder = open_decoder(name, trust_remote_code=trust_remote_code)
    check_length(sequence_length, decoder.longest, SEQUENCE_LENGTH)
    length = min(sequence_length, decoder.longest)
    count = None if tokens is None else max(2, round(tokens / length))
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for ids in token_batches(text, decoder.tokenizer, length=length, count=count, batch=1)
    ]
    with progress.stage("evaluate", len(batches)) as step:
        return perplexity(decoder.run, _counted(batches, step))


def _counted(batches: Sequence[Inputs], step: Callable[[], None]) -> Iterator[Inputs]:
    for batch in batches:
        yield batch
        step()


def _longest(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or DEFAULT_LONGEST)
