"""How much of the dense model is left: perplexity, agreement and divergence; cosine for encoders; error of any output.

Every figure takes models as functions from a batch of inputs to their first output, so that one code serves the
loaded model, the slim program and the slim ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from dotresize_fx.gram import padding_mask, token_rows

Inputs = Mapping[str, torch.Tensor]
Run = Callable[[Inputs], torch.Tensor]

# Positions whose distributions over the vocabulary are held in memory at once.
POSITIONS_AT_ONCE = 64
GPU_POSITIONS_AT_ONCE = 2048


@dataclass(frozen=True)
class DecoderComparison:
    """Sums over ``tokens`` predicted tokens; losses are negative log-likelihoods in nats."""

    tokens: int
    dense_loss: float
    slim_loss: float
    agreements: int
    divergence: float

    @property
    def dense_perplexity(self) -> float:
        return math.exp(self.dense_loss / self.tokens)

    @property
    def slim_perplexity(self) -> float:
        return math.exp(self.slim_loss / self.tokens)

    @property
    def excess(self) -> float:
        """ln(perplexity slim / perplexity dense), in nats."""
        return (self.slim_loss - self.dense_loss) / self.tokens

    @property
    def top1_agreement(self) -> float:
        """Share of positions at which both predict the same next token."""
        return self.agreements / self.tokens

    @property
    def kl_to_dense(self) -> float:
        """Mean KL(dense || slim) of the next-token distributions, in nats."""
        return self.divergence / self.tokens


def perplexity(run: Run, batches: Iterable[Inputs]) -> tuple[float, int]:
    """(perplexity, predicted tokens) of a decoder; every sequence starts afresh, padding is not predicted."""
    loss, tokens = 0.0, 0
    for batch in batches:
        logits, wanted = _predictions(run(batch), batch)
        for part, target in zip(_parts(logits), _parts(wanted), strict=True):
            loss += float(torch.nn.functional.cross_entropy(part.float(), target, reduction="sum"))
        tokens += len(wanted)
    return math.exp(loss / tokens), tokens


def compare_decoders(dense: Run, slim: Run, batches: Iterable[Inputs], ids: str = "input_ids") -> DecoderComparison:
    """Both models on the same batches; ``ids`` is the input whose next tokens they predict."""
    tokens = agreements = 0
    dense_loss = slim_loss = divergence = 0.0
    for batch in batches:
        dense_logits, wanted = _predictions(dense(batch), batch, ids)
        slim_logits, _ = _predictions(slim(batch), batch, ids)
        tokens += len(wanted)
        for p, q, target in zip(_parts(dense_logits), _parts(slim_logits), _parts(wanted), strict=True):
            log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
            dense_loss -= float(log_p.gather(1, target[:, None]).double().sum())
            slim_loss -= float(log_q.gather(1, target[:, None]).double().sum())
            agreements += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            divergence += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
    return DecoderComparison(tokens, dense_loss, slim_loss, agreements, divergence)


def _parts(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(rows, GPU_POSITIONS_AT_ONCE if rows.is_cuda else POSITIONS_AT_ONCE)


def _predictions(logits: torch.Tensor, batch: Inputs, name: str = "input_ids") -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, vocabulary) logits and (tokens,) next tokens, of real positions with a real next token."""
    ids = batch[name].long()
    mask = batch.get("decoder_attention_mask" if name.startswith("decoder_") else "attention_mask")
    if mask is None or mask.shape != ids.shape or mask.is_floating_point():
        return logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    mask = mask.long()
    real = (mask[:, :-1] * mask[:, 1:]).bool()
    return (
        (logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) if real.all() else (logits[:, :-1][real], ids[:, 1:][real])
    )


@dataclass(frozen=True)
class OutputComparison:
    """First outputs of two models: ``count`` rows, the last axis's; sums of squares over all of their numbers.

    ``mean_cosine`` is None where a row is one number.
    """

    count: int
    dense_square: float
    error_square: float
    mean_cosine: float | None

    @property
    def relative_error(self) -> float:
        """||slim - dense|| / ||dense|| over everything that was put out."""
        return math.sqrt(self.error_square / self.dense_square) if self.dense_square else math.inf


def compare_answers(dense: Run, slim: Run, batches: Iterable[Inputs]) -> OutputComparison:
    """Both models' first outputs, whatever they are, on the same batches; padding left out where a mask tells it."""
    count, square, error, cosine, width = 0, 0.0, 0.0, 0.0, 1
    for batch in batches:
        mask = padding_mask(batch)
        first, second = (answer_rows(run(batch), mask).double() for run in (dense, slim))
        count, width = count + len(first), first.shape[1]
        square += float(first.square().sum())
        error += float((second - first).square().sum())
        cosine += float(torch.nn.functional.cosine_similarity(first, second).sum())
    return OutputComparison(count, square, error, cosine / count if width > 1 else None)


def answer_rows(value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(rows, width) of an output of any shape: the last axis's, without padding; of single numbers a column."""
    return value.reshape(-1, 1) if value.ndim < 2 else token_rows(value, mask)


def mean_cosine(dense: Run, slim: Run, batches: Iterable[Inputs]) -> tuple[float, int]:
    """(mean cosine, count) of an encoder's first output, (batch, length, width) mean-pooled or (batch, width)."""
    total, count = 0.0, 0
    for batch in batches:
        first, second = (pooled(run(batch), batch) for run in (dense, slim))
        total += float(torch.nn.functional.cosine_similarity(first, second).double().sum())
        count += len(first)
    return total / count, count


def pooled(states: torch.Tensor, batch: Inputs) -> torch.Tensor:
    """(batch, width): the mean over real positions; an output without positions, a classifier's, as it is."""
    if states.ndim == 2:
        return states
    if "attention_mask" not in batch:
        return states.mean(1)
    mask = batch["attention_mask"][..., None].to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1)
