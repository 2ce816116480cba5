"""Perplexity, agreement, divergence and cosine, against the definitions written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotresize_fx.fidelity import compare_decoders, mean_cosine, perplexity

Batch = Mapping[str, torch.Tensor]
VOCABULARY = 7

# Sums of a few hundred float32 terms against float64: rounding only.
CLOSE = 1e-5


def model(seed: int) -> Callable[[Batch], torch.Tensor]:
    """A bigram table: logits (batch, length, vocabulary) that depend on each position's own token only."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return lambda batch: table[batch["input_ids"]]


def batch(rows: int, length: int, padding: int = 0, side: str = "left", seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padding:
        mask[0, :padding] = 0 if side == "left" else 1
        if side == "right":
            mask[0, -padding:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def sequences(data: Batch) -> list[torch.Tensor]:
    """The real tokens, row by row."""
    return [ids[mask.bool()] for ids, mask in zip(data["input_ids"], data["attention_mask"], strict=True)]


def by_hand(run: Callable[[Batch], torch.Tensor], data: list[Batch]) -> tuple[float, int]:
    losses = []
    for ids in (row for part in data for row in sequences(part)):
        logits = run({"input_ids": ids[None]})[0].double()
        for position in range(len(ids) - 1):
            probabilities = logits[position].exp() / logits[position].exp().sum()
            losses.append(-math.log(probabilities[ids[position + 1]]))
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("side", ["left", "right"])
def test_perplexity_is_the_definition(side: str) -> None:
    """Several batches, more positions than are held at once, and padding on either side that is not predicted."""
    data = [batch(3, 90, 17, side), batch(1, 5, seed=1)]
    found, tokens = perplexity(model(0), data)
    expected, count = by_hand(model(0), data)
    assert tokens == count == 72 + 89 + 89 + 4
    assert found == pytest.approx(expected, rel=CLOSE)


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    found, _ = perplexity(lambda b: torch.zeros(*b["input_ids"].shape, VOCABULARY), [batch(2, 9)])
    assert found == pytest.approx(VOCABULARY, rel=CLOSE)


def test_batches_without_a_mask_have_no_padding() -> None:
    data = batch(2, 9)
    assert perplexity(model(0), [{"input_ids": data["input_ids"]}]) == perplexity(model(0), [data])


def test_what_stands_on_padding_does_not_matter() -> None:
    data = batch(2, 12, 5)
    other = {**data, "input_ids": data["input_ids"].clone()}
    other["input_ids"][0, :5] = 0
    assert not torch.equal(other["input_ids"], data["input_ids"])
    assert perplexity(model(0), [other]) == perplexity(model(0), [data])
    assert compare_decoders(model(0), model(1), [other]) == compare_decoders(model(0), model(1), [data])


def test_a_comparison_is_the_definitions() -> None:
    data = [batch(3, 70, 11), batch(2, 8, seed=1)]
    dense, slim = model(0), model(1)
    figures = compare_decoders(dense, slim, data)
    divergences, agreements = [], []
    for ids in (row for part in data for row in sequences(part)):
        p, q = (run({"input_ids": ids[None, :-1]})[0].double().softmax(-1) for run in (dense, slim))
        divergences += [
            float(sum(a * math.log(a / b) for a, b in zip(x, y, strict=True))) for x, y in zip(p, q, strict=True)
        ]
        agreements += [bool(x.argmax() == y.argmax()) for x, y in zip(p, q, strict=True)]
    assert figures.tokens == len(divergences)
    assert figures.kl_to_dense == pytest.approx(sum(divergences) / len(divergences), rel=CLOSE)
    assert figures.top1_agreement == sum(agreements) / len(agreements)
    assert 0 < figures.top1_agreement < 1
    assert figures.dense_perplexity == pytest.approx(perplexity(dense, data)[0], rel=CLOSE)
    assert figures.slim_perplexity == pytest.approx(perplexity(slim, data)[0], rel=CLOSE)
    assert figures.excess == pytest.approx(math.log(figures.slim_perplexity / figures.dense_perplexity), rel=CLOSE)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(2, 80))
def test_a_divergence_is_not_negative(first: int, second: int, length: int) -> None:
    figures = compare_decoders(model(first), model(second), [batch(2, length)])
    assert figures.kl_to_dense >= 0 if first != second else figures.kl_to_dense == 0


def test_a_model_compared_with_itself() -> None:
    figures = compare_decoders(model(0), model(0), [batch(2, 70, 3)])
    assert (figures.kl_to_dense, figures.top1_agreement, figures.excess) == (0, 1, 0)


def states(seed: int) -> Callable[[Batch], torch.Tensor]:
    table = torch.randn(VOCABULARY, 5, generator=torch.Generator().manual_seed(seed))
    return lambda b: table[b["input_ids"]]


def test_the_mean_cosine_is_the_definition() -> None:
    data = [batch(3, 12, 5), batch(2, 4, seed=1)]
    found, count = mean_cosine(states(0), states(1), data)
    cosines = []
    for ids in (row for part in data for row in sequences(part)):
        a, b = (run({"input_ids": ids[None]})[0].double().mean(0) for run in (states(0), states(1)))
        cosines.append(float(a @ b / (a.norm() * b.norm())))
    assert count == len(cosines) == 5
    assert found == pytest.approx(sum(cosines) / 5, rel=CLOSE, abs=CLOSE)


def test_the_cosine_of_a_model_with_itself_and_with_its_opposite() -> None:
    run = states(0)
    assert mean_cosine(run, run, [batch(3, 6)])[0] == pytest.approx(1, abs=CLOSE)
    assert mean_cosine(run, lambda b: -2 * run(b), [batch(3, 6)])[0] == pytest.approx(-1, abs=CLOSE)
