"""Calibration statistics: sums do not depend on how rows come, padding does not count."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotresize_fx.errors import SolverError
from dotresize_fx.gram import GramAccumulator, RegionStatistics, check_finite, padding_mask, token_rows
from dotresize_fx.regions import Region, RegionKind, Symmetry


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, 20), max_size=4), n=st.integers(1, 5), m=st.integers(1, 4))
def test_any_split_of_the_rows_gives_the_same_sums(cuts: list[int], n: int, m: int) -> None:
    x, y = rows(20, n), rows(20, m, 1)
    accumulator = GramAccumulator()
    bounds = [0, *sorted(cuts), 20]
    for start, stop in pairwise(bounds):
        accumulator.add(x[start:stop], wanted=y[start:stop])
    assert accumulator.tokens == 20
    # float64 sums of 20 numbers of about 1 in another order.
    torch.testing.assert_close(accumulator.gram, x.T @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(accumulator.cross["wanted"], x.T @ y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(accumulator.energy["wanted"], y.square().sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 64, 65, 700, 1025])
def test_what_panels_leave_out_is_there_once_it_is_asked_for(n: int) -> None:
    accumulator = GramAccumulator()
    for again in (1, 2):
        accumulator.add(rows(3, n))
        # float64 sums of six numbers of about 1 in another order.
        torch.testing.assert_close(accumulator.gram, again * rows(3, n).T @ rows(3, n), rtol=1e-12, atol=1e-12)


def test_half_precision_is_multiplied_in_float32_and_summed_in_float64() -> None:
    x = rows(64, 3).bfloat16()
    accumulator = GramAccumulator()
    for part in x.split(8):
        accumulator.add(part, own=part)
    assert accumulator.gram.dtype is torch.float64
    exact = x.double().T @ x.double()
    # float32 products of 8 rows: 8 roundings of 6e-8.
    torch.testing.assert_close(accumulator.gram, exact, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(accumulator.cross["own"], exact, rtol=1e-6, atol=1e-5)
    # Summed in bfloat16, 64 squares would be off by percents.
    assert abs(float(accumulator.energy["own"]) / float(x.double().square().sum()) - 1) <= 1e-6


def test_long_sums_do_not_lose_small_terms() -> None:
    accumulator = GramAccumulator()
    accumulator.add(torch.full((1, 1), 2.0**13))
    for _ in range(100):
        accumulator.add(torch.ones(1, 1))
    assert float(accumulator.gram) == 2.0**26 + 100  # in float32, 2**26 + 1 is 2**26


@settings(max_examples=30, deadline=None, derandomize=True)
@given(mask=st.lists(st.integers(0, 1), min_size=6, max_size=6), joined=st.booleans())
def test_padding_is_dropped(mask: list[int], joined: bool) -> None:
    value = torch.arange(24.0).view(2, 3, 4)
    kept = token_rows(value.view(6, 4) if joined else value, torch.tensor(mask).view(2, 3))
    expected = [value.view(6, 4)[i].tolist() for i, real in enumerate(mask) if real]
    assert kept.tolist() == expected


def test_without_a_row_per_token_everything_counts() -> None:
    value = torch.arange(24.0).view(2, 3, 4)
    assert token_rows(value, None).shape == (6, 4)
    pooled = value[:, 0]
    assert torch.equal(token_rows(pooled, torch.zeros(2, 3)), pooled)


def test_activation_norms_are_root_mean_squares() -> None:
    x = rows(20, 3)
    statistics = RegionStatistics(20, x.T @ x / 20)
    torch.testing.assert_close(statistics.activation_norm, x.square().mean(0).sqrt())
    rounded = RegionStatistics(20, torch.tensor([[-1e-30]], dtype=torch.float64))
    assert rounded.activation_norm.tolist() == [0.0]


def test_a_mask_that_leaves_nothing_out_is_none() -> None:
    mask = torch.ones(2, 3, dtype=torch.int64)
    assert padding_mask({}) is None
    assert padding_mask({"attention_mask": mask}) is None
    mask[1, 0] = 0
    assert padding_mask({"attention_mask": mask}) is mask


def test_a_mask_that_is_no_mask_of_the_programs_tokens_says_nothing() -> None:
    mask = torch.tensor([[0, 1, 1]])
    assert padding_mask({"attention_mask": mask}) is mask
    assert padding_mask({"attention_mask": mask.float()}) is None
    assert padding_mask({"attention_mask": mask[None]}) is None
    assert padding_mask({"attention_mask": mask, "decoder_input_ids": mask}) is None


def test_the_expert_that_overflows_is_named() -> None:
    region = Region("layer", RegionKind.EXPERTS, Symmetry.PERMUTATION, 2, ("up",), ("down",))
    gram = torch.ones(3, 2, 2)
    check_finite(gram, region)
    gram[1, 0, 0] = float("nan")
    with pytest.raises(SolverError, match="layer: activations of expert 1 on the calibration data are infinite or NaN"):
        check_finite(gram, region)


@pytest.mark.parametrize("kept", [[0], [4, 1], [0, 1, 2, 3, 4]])
def test_some_columns_are_what_a_selection_of_them_would_give(kept: list[int]) -> None:
    accumulator = GramAccumulator()
    accumulator.add(rows(20, 5), wanted=rows(20, 2, 1))
    chosen = torch.tensor(kept)
    found, mapped = accumulator.of(chosen), accumulator.through(torch.eye(5, dtype=torch.float64)[:, chosen])
    assert found.tokens == mapped.tokens == 20
    assert torch.equal(found.gram, mapped.gram)  # zeros are all that the products add
    assert torch.equal(found.cross["wanted"], mapped.cross["wanted"])
    assert found.energy == mapped.energy
