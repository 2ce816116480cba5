"""Where activations wait, and in what products are taken."""

from __future__ import annotations

import pytest
import torch

from dotresize_fx import device
from dotresize_fx.device import computes_in_half, free_on_gpu, held_bytes, stream_place
from dotresize_fx.memory import Memory
from dotresize_fx.options import Options

GIB = 1 << 30


@pytest.mark.parametrize(
    ("budget", "streams", "where", "on_cpu"),
    [
        (100, 10, "device", "device"),
        (24, 10, "pinned", "files"),
        (12, 10, "files", "files"),
        (100, 30, "pinned", "files"),
    ],
)
def test_streams_wait_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, budget: int, streams: int, where: str, on_cpu: str
) -> None:
    """A GPU with 80 GiB free, of which streams may take a quarter."""
    monkeypatch.setattr(device, "free_on_gpu", lambda _: 80 * GIB)
    assert stream_place(Memory(budget * GIB), streams * GIB, "cuda", 1 << 20) == where
    assert stream_place(Memory(budget * GIB), streams * GIB, "cpu", 1 << 20) == on_cpu
    assert held_bytes(Memory(budget * GIB), "cuda") == 2 * GIB
    assert held_bytes(Memory(4 * GIB), "cuda") == GIB


def test_what_is_pinned_is_told_as_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "free_on_gpu", lambda _: 80 * GIB)
    assert stream_place(Memory(24 * GIB), 16 * GIB, "cuda", 128 << 20) == "pinned"
    assert stream_place(Memory(24 * GIB), 16 * GIB, "cuda", 80 << 20) == "pinned"  # two pieces and a half
    assert stream_place(Memory(24 * GIB), 16 * GIB, "cuda", 20 << 20) == "files"  # which takes 32


def test_a_cpu_has_no_other_memory() -> None:
    assert free_on_gpu("cpu") is None
    assert held_bytes(Memory(GIB), "cpu") == 0


@pytest.mark.parametrize(
    ("asked", "stored", "place", "half"),
    [
        (None, torch.bfloat16, "cuda", True),
        (None, torch.float32, "cuda", False),
        (None, torch.bfloat16, "cpu", False),
        ("bfloat16", torch.float32, "cpu", True),
        ("float32", torch.bfloat16, "cuda", False),
    ],
)
def test_products_are_taken_as_a_model_is_stored(
    asked: str | None, stored: torch.dtype, place: str, half: bool
) -> None:
    assert computes_in_half(Options(compute_dtype=asked), stored, place) is half
    assert not computes_in_half(Options(), None, "cuda")
