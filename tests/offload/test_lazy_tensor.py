"""Tensors that are read when they are needed: what is known without their numbers, and what is computed with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import dotresize_fx.offload.lazy_tensor
from dotresize_fx.errors import UsageError
from dotresize_fx.offload.lazy_tensor import LazyTensor, in_memory, no_reading

NUMBERS = torch.arange(24, dtype=torch.float32).reshape(6, 4)


@pytest.fixture
def reads() -> list[int]:
    """One entry a read of ``lazy``."""
    return []


@pytest.fixture
def lazy(reads: list[int]) -> LazyTensor:
    def source() -> torch.Tensor:
        reads.append(1)
        return NUMBERS.bfloat16()

    return LazyTensor(source, (6, 4), torch.float32)


def test_shape_and_dtype_are_known_without_reading(lazy: LazyTensor, reads: list[int]) -> None:
    assert (lazy.shape, lazy.ndim, lazy.numel(), len(lazy), lazy.nbytes) == ((6, 4), 2, 24, 6, 96)
    assert lazy.dtype is torch.float32
    assert lazy.is_floating_point()
    assert "6, 4" in repr(lazy)
    kept = torch.nn.Parameter(lazy, requires_grad=False)
    assert isinstance(kept, torch.nn.Parameter)
    assert isinstance(kept, LazyTensor)
    assert not reads


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t.mT.contiguous(),
        lambda t: t[1:3],
        lambda t: t[..., ::2].clone(),
        lambda t: t[2],
        lambda t: t.reshape(3, 8).detach(),
        lambda t: torch.stack([t, t]),
        lambda t: torch.cat([t, t[:2]], 0),
        lambda t: t.to("cpu", torch.float32),
    ],
)
def test_views_wait(lazy: LazyTensor, reads: list[int], view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    found, expected = view(lazy), view(NUMBERS)
    assert isinstance(found, LazyTensor)
    assert found.shape == expected.shape
    assert not reads
    assert torch.equal(in_memory(found), expected)


def test_what_computes_reads(lazy: LazyTensor, reads: list[int]) -> None:
    x = torch.ones(2, 4)
    for found in (torch.nn.functional.linear(x, lazy), torch.ops.aten.linear.default(x, lazy), x @ lazy.t()):
        assert type(found) is torch.Tensor
        assert torch.equal(found, x @ NUMBERS.T)
    assert len(reads) == 3
    assert lazy.double().dtype is torch.float64
    assert not isinstance(lazy + 1, LazyTensor)


def test_rows_of_a_table_and_pieces_of_a_head_are_read_alone(lazy: LazyTensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dotresize_fx.offload.lazy_tensor, "PIECE", 2 * 4 * 4)  # bytes of two rows
    monkeypatch.setattr(LazyTensor, "read", lambda self: pytest.fail("it was read whole"))
    ids = torch.tensor([[1, 5], [0, 1]])
    assert torch.equal(torch.nn.functional.embedding(ids, lazy), NUMBERS[ids])
    assert torch.equal(torch.ops.aten.embedding.default(lazy, ids), NUMBERS[ids])
    assert torch.equal(lazy.index_select(0, ids[0]), NUMBERS[ids[0]])
    lazy = lazy[...]  # as transformers takes what it loads
    assert torch.equal(torch.ops.aten.embedding.default(lazy, ids), NUMBERS[ids])
    x, bias = torch.ones(3, 4), torch.arange(6.0)
    assert torch.equal(torch.nn.functional.linear(x, lazy, bias), x @ NUMBERS.T + bias)
    assert torch.equal(torch.ops.aten.linear.default(x, lazy), x @ NUMBERS.T)


def test_nothing_can_be_written_to_it_and_it_has_no_memory(lazy: LazyTensor) -> None:
    for write in (lambda: lazy.zero_(), lambda: lazy.__setitem__(0, 1), lambda: lazy.add_(1)):
        with pytest.raises(TypeError, match="cannot be written to"):
            write()
    with pytest.raises(TypeError, match="no memory"):
        lazy.data_ptr()


def test_reading_can_be_refused(lazy: LazyTensor, reads: list[int]) -> None:
    with no_reading("not now") as refused:
        assert not refused()
        with pytest.raises(UsageError, match="not now"):
            _ = lazy + 1
        assert refused()
    assert not reads
    assert torch.equal(lazy + 1, NUMBERS + 1)
