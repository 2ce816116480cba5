"""Rows that were taken apart are put together again, however they lay."""

from __future__ import annotations

import pytest
import torch

from dotresize_fx.packing import Packing

STORED = torch.arange(48.0).view(12, 4)


@pytest.mark.parametrize("groups", [1, 3, 0])
@pytest.mark.parametrize("axis", [-2, -1])
def test_joins_what_was_taken_apart(groups: int, axis: int) -> None:
    stored = STORED if axis == -2 else STORED[:, 0]
    rows = torch.arange(12).view(groups or 6, -1)  # with groups: of each a first and a second half
    first, second = rows.chunk(2, 1)
    parts = [stored[first.flatten()], stored[second.flatten()]]
    assert torch.equal(Packing(("a", "b"), groups).join(parts, axis), stored)


def test_joins_experts_and_parts_of_several_sizes() -> None:
    experts = torch.stack([STORED, -STORED])
    assert torch.equal(Packing(("a", "b")).join([experts[:, :5], experts[:, 5:]], -2), experts)


def test_refuses_rows_that_make_no_groups() -> None:
    with pytest.raises(ValueError, match="do not make 3 groups"):
        Packing(("a", "b"), 3).join([STORED[:6], STORED[6:11]], -2)
