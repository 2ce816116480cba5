"""What one run did and measured, typed: the source of report.json, report.html and the terminal table.

Sizes are bytes, times seconds, losses nats. ``None`` means that the figure was not measured, and every
rendering says so; no figure is ever filled in. report.json holds what :meth:`Report.to_json` returns.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from dotresize_fx.task import Task

REPORT_FILE = "report.json"
# 2: ``cache`` says which inputs and outputs the ONNX of a decoder has.
# 3: ``removed_blocks`` and ``low_rank_linears``; ``regions`` has none of blocks that went, and their linears no roles.
SCHEMA_VERSION = 3

Scalar = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """The model that went in. ``description`` says where the weights came from and in which form."""

    name: str
    description: str
    task: Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where the run took place; ``threads`` is what torch used."""

    cpu: str
    threads: int
    platform: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionRow:
    """One coupled dimension and what became of it.

    ``writers`` and ``readers`` are names of linears. ``method`` is None where the region was found and left
    alone. ``error`` is ||slim - wanted|| / ||wanted|| of the reader's output on batches not solved with. ``notes``
    holds what the method has to say of itself (Sinkhorn iterations, marginal error).
    """

    name: str
    kind: str
    symmetry: str
    width_before: int
    width_after: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    method: str | None = None
    error: float | None = None
    notes: dict[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRole:
    """A linear's part in one region. A linear may have two: it reads the stream and writes an FFN's width."""

    region: str
    role: Literal["writer", "reader"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRow:
    """One line of the match table. ``shape`` is (out, in); ``reason`` is in words that a user understands.

    Raises ValueError where neither a role nor a reason is given: no linear goes without either.
    """

    name: str
    shape: tuple[int, int]
    roles: tuple[LinearRole, ...] = ()
    reason: str = ""

    def __post_init__(self) -> None:
        if not self.roles and not self.reason:
            raise ValueError(f"linear {self.name}: skipped without a reason")

    @property
    def status(self) -> Literal["matched", "skipped"]:
        return "matched" if self.roles else "skipped"


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRow:
    """A block that went, ``index`` counted from 0 in the dense model, as are all numbers of blocks.

    ``name`` is what the names of its weights begin with, empty where they have nothing in common. Merged into the block
    ``merged_into``, it weighed ``alpha`` in it and that one 1 - alpha (which may be in the list itself: it went into
    the next with what it had taken in). Both None: it was dropped.
    """

    index: int
    name: str = ""
    merged_into: int | None = None
    alpha: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RankRow:
    """A linear from ``d_in`` to ``d_out`` that is two now, by way of ``rank``.

    ``error`` is ||slim - wanted|| / ||wanted|| of what it puts out on batches not solved with.
    """

    name: str
    d_in: int
    d_out: int
    rank: int
    error: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Seconds per run of one model, from runs interleaved with the other model's.

    ``p25`` and ``p75`` are quartiles. ``batch`` and ``length`` are the first two dimensions of the inputs
    (None where they have fewer). ``peak_rss_bytes`` is of the process with this model alone.
    """

    median: float
    min: float
    max: float
    p25: float
    p75: float
    runs: int
    batch: int | None
    length: int | None
    threads: int
    provider: str
    peak_rss_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SideFigures:
    """The figures of one side, dense or slim. MACs count a multiply with its add as one.

    ``macs_per_token`` has head and attention in it, ``block_macs_per_token`` the blocks' linears alone;
    ``file_bytes`` is model.onnx with its external data.
    """

    parameters: int | None = None
    block_linear_weights: int | None = None
    macs_per_token: int | None = None
    block_macs_per_token: int | None = None
    file_bytes: int | None = None
    latency: Latency | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderFidelity:
    """A language model against its dense self on ``tokens`` tokens of held-out ``text``.

    ``top1_agreement`` is the share of positions at which both predict the same next token; ``kl_to_dense`` is
    the mean KL(dense || slim) of the next-token distributions, in nats.
    """

    text: str
    tokens: int
    dense_perplexity: float | None = None
    slim_perplexity: float | None = None
    top1_agreement: float | None = None
    kl_to_dense: float | None = None

    @property
    def excess(self) -> float | None:
        """ln(perplexity slim / perplexity dense), in nats."""
        if self.dense_perplexity is None or self.slim_perplexity is None:
            return None
        return math.log(self.slim_perplexity / self.dense_perplexity)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderFidelity:
    """An encoder against its dense self: mean cosine of ``count`` pooled outputs on held-out ``text``."""

    text: str
    count: int
    mean_cosine: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputFidelity:
    """Any other model's first output against the dense one's on held-out inputs, ``data`` in words.

    ``relative_error`` is ||slim - dense|| / ||dense|| over all of it, ``mean_cosine`` the mean over its ``count`` rows
    along the last axis, None where such a row is one number.
    """

    data: str
    count: int
    relative_error: float | None = None
    mean_cosine: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """Slim ONNX in ONNX Runtime ``against`` what it has to compute: the largest absolute difference over ``cases``.

    ``max_abs_output`` is the largest absolute output of that, the scale of the difference.
    """

    max_abs_difference: float
    tolerance: float
    max_abs_output: float | None = None
    cases: int | None = None
    against: str = "slim program"

    @property
    def passed(self) -> bool:
        """False for a NaN too."""
        return self.max_abs_difference <= self.tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionFigures:
    """One side written in ``precision`` (float16, bfloat16, int8, int4), as its file runs in ONNX Runtime.

    ``fidelity`` is to the dense program in float32; ``top1_agreement`` is with this side's own program in float32, the
    share of positions at which both predict the same next token. ``verification`` is of the slim side's dtype: its
    differences are relative, an output's largest difference to its largest number. Quantised weights are other weights
    and have none. Of its ``linears``, products with
    weights, ``quantised_linears`` are quantised; None for a dtype.
    """

    side: Literal["dense", "slim"]
    precision: str
    file_bytes: int | None = None
    latency: Latency | None = None
    fidelity: DecoderFidelity | EncoderFidelity | OutputFidelity | None = None
    top1_agreement: float | None = None
    verification: Verification | None = None
    linears: int | None = None
    quantised_linears: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFigures:
    """The Hugging Face checkpoint in ``folder`` of OUT, loaded with from_pretrained, against the slim program.

    ``config_changes`` maps fields of config.json to what they were and are. Of ``tokens_generated`` greedy ones the
    first ``tokens_equal`` are the slim program's, whose next two candidates were then level; None for encoders.
    ``file_bytes`` are the weights'.
    """

    folder: str
    config_changes: dict[str, list[Any]]
    parameters: int
    file_bytes: int
    max_abs_difference: float
    tolerance: float
    max_abs_output: float
    cases: int
    tokens_generated: int | None = None
    tokens_equal: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatFigures:
    """What was written in ``format`` into ``folder`` of OUT, run in ``runtime``."""

    format: str
    folder: str
    runtime: str
    file_bytes: int
    verification: Verification


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyTarget:
    """A workload's time, slim over dense, where widths were planned by the clock; ``target`` None: a ratio was asked.

    ``predicted`` is what the regions' kernels said, ``measured`` both models in turns, end to end, ``low`` to ``high``
    its 95 % interval. ``rehearsals`` are what models of planned widths took before anything was solved.
    """

    workload: str
    target: float | None
    predicted: float
    measured: float
    low: float
    high: float
    rehearsals: tuple[float, ...] = ()
    threads: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Everything measured. ``macs_length`` is the length in tokens at which attention's MACs are counted.

    ``dense`` and ``slim`` are float32, whatever model.onnx was asked to be: what it is instead, ``precisions`` has, and
    the dense model written alike.
    """

    dense: SideFigures = SideFigures()
    slim: SideFigures = SideFigures()
    macs_length: int | None = None
    fidelity: tuple[DecoderFidelity | EncoderFidelity | OutputFidelity, ...] = ()
    verification: Verification | None = None
    checkpoint: CheckpointFigures | None = None
    precisions: tuple[PrecisionFigures, ...] = ()
    formats: tuple[FormatFigures, ...] = ()
    latency_target: LatencyTarget | None = None
    peak_export_bytes: int | None = None
    peak_runtime_bytes: int | None = None

    @property
    def block_weights_removed(self) -> float | None:
        """Share of the blocks' linear weights that is gone; negative where there are more."""
        dense, slim = self.dense.block_linear_weights, self.slim.block_linear_weights
        return None if not dense or slim is None else 1 - slim / dense

    @property
    def speedup(self) -> float | None:
        """Median dense latency over median slim latency: above 1 is faster."""
        dense, slim = self.dense.latency, self.slim.latency
        return None if dense is None or slim is None or slim.median <= 0 else dense.median / slim.median


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One run of the compiler.

    ``inputs_sha256`` and ``outputs_sha256`` map file names to hex digests (outputs: every file of OUT except
    the reports). ``stage_seconds`` keeps the order of the stages and may end in ``total``. ``regions``, of the
    dense model, are those of blocks that stay, ``linears`` all of them. ``cache``: model.onnx
    reads ``past_key_values.N.key`` and ``.value`` and puts out ``present.N.key`` and ``.value`` beside ``logits``;
    without it no cache goes in or out.
    """

    tool_version: str
    packages: dict[str, str]
    machine: Machine
    model: ModelSource
    options: dict[str, Any]
    seed: int
    cache: bool = False
    inputs_sha256: dict[str, str] = field(default_factory=dict)
    outputs_sha256: dict[str, str] = field(default_factory=dict)
    regions: tuple[RegionRow, ...] = ()
    linears: tuple[LinearRow, ...] = ()
    removed_blocks: tuple[BlockRow, ...] = ()
    low_rank_linears: tuple[RankRow, ...] = ()
    figures: Figures = Figures()
    stage_seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What report.json holds: the fields, ``schema_version`` and a ``summary`` of derived figures.

        JSON has no infinity and no NaN: they become the strings "inf", "-inf" and "nan".
        """
        content: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        for entry, linear in zip(content["linears"], self.linears, strict=True):
            entry["status"] = linear.status
        measured: list[tuple[Any, Any]] = [*zip(content["figures"]["fidelity"], self.figures.fidelity, strict=True)]
        for written, row in zip(content["figures"]["precisions"], self.figures.precisions, strict=True):
            measured.append((written["fidelity"], row.fidelity))
        for entry, fidelity in measured:
            if isinstance(fidelity, DecoderFidelity):
                entry["excess"] = fidelity.excess
        verification = self.figures.verification
        content["summary"] = {
            "block_weights_removed": self.figures.block_weights_removed,
            "speedup": self.figures.speedup,
            "verified": None if verification is None else verification.passed,
        }
        plain: dict[str, Any] = plain_json(content)
        return plain


def plain_json(value: Any) -> Any:
    """``value`` as JSON can hold it. What is no JSON type (a path among the options) becomes its text."""
    if isinstance(value, dict):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
