"""The host's pinned memory, in pieces: as much of it as is told, and the same numbers there and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dotresize_fx.offload import pinned_memory
from dotresize_fx.offload.pinned_memory import (
    PINNED_PIECE,
    from_host,
    on_gpu,
    piece_sizes,
    pieces_of,
    pinned_size,
    to_host,
)

on_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]
MIB = 1 << 20


@given(st.integers(0, 5 * PINNED_PIECE))
def test_pieces_are_all_and_the_last_alone_is_small(size: int) -> None:
    pieces = piece_sizes(size)
    assert sum(pieces) == size
    assert all(piece == PINNED_PIECE for piece in pieces[:-1])
    assert all(0 < piece <= PINNED_PIECE for piece in pieces)


def test_a_piece_takes_a_power_of_two() -> None:
    assert [pinned_size(size) for size in (0, 1, 64, 65, 80 * MIB)] == [0, 1, 64, 128, 80 * MIB]
    assert pinned_size(90 * MIB, 33 * MIB) == 90 * MIB  # a piece, and 1 MiB
    assert pinned_size(74 * MIB, 37 * MIB) == 80 * MIB  # and 5, which take 8


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1000, 7)])
def test_pieces_are_of_the_tensor_s_own_memory(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    monkeypatch.setattr(pinned_memory, "PINNED_PIECE", 64)
    tensor = torch.randn(shape).bfloat16()
    pieces = pieces_of(tensor)
    assert [len(piece) for piece in pieces] == (piece_sizes(tensor.nbytes) or [0])
    assert torch.equal(torch.cat(list(pieces)).view(torch.bfloat16).reshape(shape), tensor)
    for piece in pieces:
        piece.zero_()
    assert not tensor.any()


def test_what_is_not_contiguous_comes_in_its_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_memory, "PINNED_PIECE", 64)
    tensor = torch.randn(100, 7).mT
    assert torch.equal(torch.cat(list(pieces_of(tensor))).view(torch.float32).reshape(7, 100), tensor)


def _numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(0, 100, shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1000, 77)])
class TestOnAGpu:
    pytestmark = on_cuda

    def test_numbers_come_to_it(
        self, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        """More pieces than may be under way."""
        monkeypatch.setattr(pinned_memory, "PINNED_PIECE", 1 << 10)
        tensor = _numbers(shape, dtype)
        assert torch.equal(on_gpu(tensor, torch.device("cuda")).cpu(), tensor)
        turned = tensor.mT if len(shape) > 1 else tensor
        assert torch.equal(on_gpu(turned, torch.device("cuda")).cpu(), turned)

    def test_numbers_leave_it_and_come_back(
        self, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        monkeypatch.setattr(pinned_memory, "PINNED_PIECE", 1 << 10)
        tensor = _numbers(shape, dtype).cuda()
        pieces = [to_host(part) for part in pieces_of(tensor)]
        assert all(piece.is_pinned() for piece in pieces if len(piece))
        back = from_host(pieces, tensor.shape, tensor.dtype, tensor.device)
        assert back.shape == tensor.shape
        assert torch.equal(back, tensor)
