"""Coherence of rotary pairs: means over the distances that attention looks across."""

from __future__ import annotations

import pytest
import torch

from dotresize_fx.rotary_coherence import OFFSET, coherence

ANGLES = torch.tensor([1.0, 0.7, 0.7, 0.01], dtype=torch.float64)
LENGTH = 9


def turns(length: int = LENGTH, start: int = 0) -> torch.Tensor:
    return torch.polar(
        torch.ones(length, 4, dtype=torch.float64), torch.arange(start, start + length)[:, None] * ANGLES
    )


def by_plain_loops(allowed: torch.Tensor) -> torch.Tensor:
    total, weights = torch.zeros(4, 4, dtype=torch.complex128), 0.0
    for i in range(len(allowed)):
        for j in range(len(allowed)):
            if allowed[i, j]:
                turned = torch.polar(torch.ones_like(ANGLES), ANGLES * (j - i))
                weight = 1 / (abs(i - j) + OFFSET)
                total, weights = total + weight * turned.conj()[:, None] * turned, weights + weight
    return total / weights


WHOLE = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
MASKS = {
    "both ways": WHOLE,
    "causal": WHOLE.tril(),
    "window": WHOLE.tril().triu(-3),
    "itself": torch.eye(LENGTH, dtype=torch.bool),
    "ahead": WHOLE.triu(2),
}


@pytest.mark.parametrize("mask", MASKS)
def test_the_mean_over_all_that_is_seen(mask: str) -> None:
    found = coherence(turns(), MASKS[mask])
    torch.testing.assert_close(found, by_plain_loops(MASKS[mask]), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, found.mH)
    assert float(torch.linalg.eigvalsh(found).min()) >= -1e-12


def test_pairs_of_one_angle_are_one() -> None:
    found = coherence(turns(), MASKS["causal"])
    torch.testing.assert_close(found[1], found[2])
    torch.testing.assert_close(found.diagonal(), torch.ones(4, dtype=torch.complex128))
    assert float(found[0, 3].abs()) < float(found[0, 1].abs()) < 1


def test_where_a_sequence_starts_and_how_large_its_tables_are_is_no_matter() -> None:
    moved = 1.3 * turns(start=20)
    torch.testing.assert_close(coherence(moved, MASKS["causal"]), coherence(turns(), MASKS["causal"]))


def test_both_ways_leaves_no_phase() -> None:
    torch.testing.assert_close(coherence(turns(), WHOLE).imag, torch.zeros(4, 4, dtype=torch.float64))
    assert float(coherence(turns(), WHOLE.tril()).imag.abs().max()) > 0.1
