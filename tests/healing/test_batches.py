"""Batches put together anew: all tokens once an epoch, and shapes that stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from dotresize_fx.healing.batches import Rebatched

Batch = Mapping[str, torch.Tensor]


def test_a_step_takes_its_tokens_and_an_epoch_every_row_once(tiny_batch: Callable[..., Batch]) -> None:
    even = Rebatched([tiny_batch(4, 8, seed=seed) for seed in range(4)], torch.device("cpu"))
    steps = even.steps(32, 0)
    epochs = [[next(steps) for _ in range(4)] for _ in range(2)]
    assert all(sorted(unit for step in epoch for unit in step) == list(range(16)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [len(batch.inputs["input_ids"]) for batch in even.batches(range(7), 24)] == [3, 3, 1]
    ragged = Rebatched([tiny_batch(2, 8), tiny_batch(2, 6, padding=2), tiny_batch(3, 8)], torch.device("cpu"))
    assert ragged.tokens == [16, 12, 24]
    assert ragged.real == [16, 10, 24]
    assert sorted(next(ragged.steps(1000, 0))) == [0, 1, 2]
    assert [tuple(batch.inputs["input_ids"].shape) for batch in ragged.batches([0, 1, 2], 100)] == [(5, 8), (2, 6)]


def test_passes_of_one_length_have_one_shape(tiny_batch: Callable[..., Batch]) -> None:
    """Padded rows or not: the masks are there for all passes or for none."""
    data = Rebatched([tiny_batch(3, 8), tiny_batch(3, 8, padding=2), tiny_batch(1, 8)], torch.device("cpu"))
    assert data.one_shape
    orders, shapes = data.steps(32, 0), set()
    for _ in range(6):
        passes = data.batches(next(orders), 24)
        shapes.add(tuple((b.inputs["input_ids"].shape, b.padding is None or b.padding.shape) for b in passes))
    assert shapes == {(((3, 8), (24,)), ((1, 8), (8,)))}
    assert next(Rebatched([tiny_batch(3, 8)], torch.device("cpu")).batches([0, 1], 24)).padding is None
    assert not Rebatched([tiny_batch(3, 8), tiny_batch(3, 9)], torch.device("cpu")).one_shape
