"""What benchmarks of slimming share: the dense model, its calibration text and what is measured, computed once."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from measure import Fidelity, calibration_rows, evaluation_rows, forward_seconds
from texts import Batches, Texts, calibration, evaluation, read_texts

from dotresize_fx.calibration import sequences_at_once
from dotresize_fx.compiler import analyse, compute_device
from dotresize_fx.cost import Cost, count_cost
from dotresize_fx.export.model_source import LoadedModel, load_model
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.options import Options
from dotresize_fx.progress import Progress
from dotresize_fx.regions import MatchReport


class Setup:
    """The dense model and its tokens; what is not always wanted is computed when it first is.

    ``sample``: the seed of a random sample of calibration text; None spreads it evenly over the sources.
    """

    def __init__(self, arguments: argparse.Namespace, sample: int | None = None) -> None:
        self.arguments, self.sample = arguments, sample
        self.device = compute_device(Options(device=arguments.device))
        self.length: int = arguments.length or (512 if self.device == "cpu" else 1024)
        self.texts: Texts = read_texts(arguments.text_dir)
        self.loaded: LoadedModel = load_model(arguments.model)
        dense: FxGraph
        matches: MatchReport
        self.captured, dense, matches = analyse(self.loaded, Progress(quiet=True))
        dense.to(self.device)
        self.dense, self.matches = dense, matches
        self.cost: Cost = count_cost(dense, self.length)
        self.calibrating = self.calibration(arguments.calibration_tokens)

    def calibration(self, tokens: int) -> Batches:
        """So many tokens of the calibration texts."""
        rows = min(calibration_rows(self.device), sequences_at_once(tokens, self.length, self.device))
        shape: dict[str, Any] = {"length": self.length, "rows": rows, "device": self.device, "seed": self.sample}
        return calibration(self.texts, self.loaded.tokenizer, tokens=tokens, **shape)

    @property
    def calibration_tokens(self) -> int:
        """How many were taken."""
        return sum(batch["input_ids"].numel() for batch in self.calibrating)

    @cached_property
    def measured(self) -> dict[str, Batches]:
        """By text, what is measured on."""
        rows, tokens = evaluation_rows(self.device), self.arguments.tokens_per_text
        shape: dict[str, Any] = {"length": self.length, "rows": rows, "device": self.device}
        return evaluation(self.texts, self.loaded.tokenizer, tokens=tokens, **shape)

    @cached_property
    def fidelity(self) -> Fidelity:
        """To the dense model, on everything that is measured on."""
        return Fidelity(self.dense, self.measured)

    @cached_property
    def forward(self) -> float:
        """Seconds of the dense model's forward pass over the calibration tokens."""
        return forward_seconds(self.dense, self.calibrating, self.device)

    @property
    def where(self) -> str:
        """The device, in words."""
        return torch.cuda.get_device_name() if self.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def said(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments, for a file of JSON."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}


def line(values: Sequence[str]) -> None:
    """Print a row of a markdown table."""
    print(f"| {' | '.join(values)} |", flush=True)


def append(file: Path | None, entry: Mapping[str, Any]) -> None:
    """One line of JSON; numbers that JSON does not have become null."""
    if file is not None:
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(finite(entry)) + "\n")


def finite(value: Any) -> Any:
    """The same with null for infinite numbers and NaN."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
