"""How much of the dense model is left: perplexity, agreement and divergence; cosine for encoders.

Every figure takes models as functions from a batch of inputs to their first output, so that one code serves the
loaded model, the slim program and the slim ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

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


def compare_decoders(dense: Run, slim: Run, batches: Iterable[Inputs]) -> DecoderComparison:
    """Both models on the same batches."""
    tokens = agreements = 0
    dense_loss = slim_loss = divergence = 0.0
    for batch in batches:
        dense_logits, wanted = _predictions(dense(batch), batch)
        slim_logits, _ = _predictions(slim(batch), batch)
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


def _predictions(logits: torch.Tensor, batch: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, vocabulary) logits and (tokens,) next tokens, of real positions with a real next token."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    if mask is None:
        return logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    real = (mask[:, :-1] * mask[:, 1:]).bool()
    return (
        (logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) if real.all() else (logits[:, :-1][real], ids[:, 1:][real])
    )


def mean_cosine(dense: Run, slim: Run, batches: Iterable[Inputs]) -> tuple[float, int]:
    """(mean cosine, count) of an encoder's first output, (batch, length, width) mean-pooled or (batch, width)."""
    total, count = 0.0, 0
    for batch in batches:
        first, second = (_pooled(run(batch), batch) for run in (dense, slim))
        total += float(torch.nn.functional.cosine_similarity(first, second).double().sum())
        count += len(first)
    return total / count, count


def _pooled(states: torch.Tensor, batch: Inputs) -> torch.Tensor:
    """(batch, width): the mean over real positions; an output without positions, a classifier's, as it is."""
    if states.ndim == 2:
        return states
    mask = batch["attention_mask"][..., None].to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1)
