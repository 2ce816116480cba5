"""Batches of inputs for calibration and for measurement, from the user's text or the built-in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dotresize_fx.errors import TextError, UsageError
from dotresize_fx.options import Options
from dotresize_fx.text import (
    Tokenizer,
    default_text,
    library_docstrings,
    new_paragraphs,
    read_text,
    sentence_batches,
    split_text,
    text_sha256,
    token_batches,
)

# Sequences run through the model at once on a CPU: few, so that one block's activations stay small. A GPU takes about
# as many tokens as keep it busy, fewer where a batch is a step of repair, which they serve as well
# (docs/measurements.md, "Scale"). All leave batches enough that some of them can be held out.
CALIBRATION_BATCH = 2
GPU_TOKENS = 8192
GPU_STEP_TOKENS = 4096
BATCHES_AT_LEAST = 16
# One at a time: a batch of logits over a large vocabulary is the largest tensor of a run.
EVALUATION_BATCH = 1
SENTENCES_PER_BATCH = 16
LONGEST_SENTENCE = 128  # tokens
# Paragraphs spread over a text hold only about as many tokens as were asked for: no reason to read another one.
LACKING = 0.1

Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Text:
    """Calibration and evaluation text, two parts of one. ``names`` are their sources, ``description`` is both.

    ``supplement`` gives text that calibrates an encoder where ``calibration`` has too little.
    """

    calibration: str
    evaluation: str
    names: str
    description: str
    supplement: Callable[[], str] | None = None


@dataclass(frozen=True)
class CalibrationData:
    """Two sets of batches that share no text. ``description`` says where the text is from, ``sha256`` what it was."""

    calibration: Sequence[Inputs]
    evaluation: Sequence[Inputs]
    description: str
    sha256: Mapping[str, str]


def load_text(files: Sequence[Path]) -> Text:
    """The first 80 % of each source calibrates, the last 20 % measures.

    Raises:
        TextError: a file is missing, empty or not UTF-8.
    """
    if not files:
        names = "pydoc_data.topics"
        description = f"{names}, first 80 % calibrates, last 20 % measures"
        return Text(*default_text(), names, description, library_docstrings)
    parts = [split_text(read_text([file])) for file in files]
    names = ", ".join(Path(file).name for file in files)
    return Text(
        "\n\n".join(part[0] for part in parts),
        "\n\n".join(part[1] for part in parts),
        names,
        f"{names}, first 80 % of each calibrates, last 20 % measures",
    )


def prepare_data(
    text: Text, options: Options, tokenizer: Tokenizer | None, task: str, longest: int, device: str = "cpu"
) -> CalibrationData:
    """Tokenise calibration and evaluation text as the options ask.

    An encoder calibrates on no paragraph twice, and on none that measures.

    Raises:
        TextError: the text cannot be used or is too short.
        UsageError: the model came without a tokenizer.
    """
    if tokenizer is None:
        raise UsageError("the model has no tokenizer, which calibration text needs: add its files to the folder")
    length = min(options.sequence_length, longest)
    wanted = options.tokens_that_calibrate(task)
    calibration, description = text.calibration, text.description
    if task == "encoder":
        calibration = new_paragraphs(text.calibration, [text.evaluation])

    def batches(part: str, tokens: int, batch: int) -> list[Inputs]:
        if task == "encoder":
            pairs = sentence_batches(
                part,
                tokenizer,
                length=min(length, LONGEST_SENTENCE),
                tokens=tokens,
                least=2 * SENTENCES_PER_BATCH,
                batch=SENTENCES_PER_BATCH,
            )
            return [{"input_ids": ids, "attention_mask": mask} for ids, mask in pairs]
        count = max(2, round(tokens / length))
        return [
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            for ids in token_batches(part, tokenizer, length=length, count=count, batch=batch)
        ]

    # The part is named: a text may do for calibration and have too little left to measure on.
    part = "the first 80 %, which calibrates"
    try:
        at_once = sequences_at_once(wanted, length, device, repairs=options.effort != "fast")
        calibrating = batches(calibration, wanted, at_once)
        lacking = wanted - _real_tokens(calibrating)
        if task == "encoder" and text.supplement is not None and lacking > LACKING * wanted:
            more = new_paragraphs(text.supplement(), [text.calibration, text.evaluation])
            calibrating += batches(more, lacking, at_once)
            calibration, description = f"{calibration}\n\n{more}", f"{description}; docstrings calibrate too"
        part = "the last 20 %, which measures"
        measured = batches(text.evaluation, options.evaluation_tokens, EVALUATION_BATCH)
    except TextError as error:
        raise TextError(f"{text.names}, {part}: {error}") from error
    hashes = {"calibration text": text_sha256(calibration), "evaluation text": text_sha256(text.evaluation)}
    return CalibrationData(calibrating, measured, description, hashes)


def sequences_at_once(tokens: int, length: int, device: str, *, repairs: bool = False) -> int:
    """How many sequences of ``length`` tokens a batch of calibration text has, of ``tokens`` in all. ``repairs``: each
    is a step too.
    """
    most = CALIBRATION_BATCH * length if device == "cpu" else GPU_STEP_TOKENS if repairs else GPU_TOKENS
    return max(1, min(most, tokens // BATCHES_AT_LEAST) // length)


def _real_tokens(batches: Sequence[Inputs]) -> int:
    """Without padding."""
    return sum(int(batch["attention_mask"].sum()) for batch in batches)
