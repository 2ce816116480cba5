"""Activations that wait on the host: the same numbers, however many are under way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dotresize_fx.offload import pinned_memory, pinned_streams
from dotresize_fx.offload.stored_tensors import Spool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize(("room", "piece"), [(0, 1 << 25), (1 << 30, 1 << 25), (1 << 30, 3 << 20)])
def test_what_waits_comes_back_while_more_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, piece: int
) -> None:
    """Each is made on the GPU, put away, fetched, changed and put away again; memory is used again meanwhile."""
    monkeypatch.setattr(pinned_streams, "ON_THE_WAY", room)
    monkeypatch.setattr(pinned_memory, "PINNED_PIECE", piece)
    spool = Spool(tmp_path, streams="pinned")
    count, size = 12, 1 << 22
    waiting = [spool.put_activation(torch.full((size,), float(i), device="cuda")) for i in range(count)]
    for again in range(3):
        for i in spool.in_turn(count, lambda i: [waiting[i], torch.zeros(3)]):
            waiting[i] = spool.put_activation(waiting[i] + 1)
            torch.full((size,), -1.0, device="cuda")  # whatever was freed is written to
        assert [float(tensor.sum()) / size for tensor in waiting] == [i + again + 1 for i in range(count)]
    assert all(tensor.device.type == "cuda" for tensor in waiting)


def test_what_nobody_took_goes(tmp_path: Path) -> None:
    spool = Spool(tmp_path, streams="pinned")
    waiting = [spool.put_activation(torch.ones(1 << 20, device="cuda")) for _ in range(4)]
    before = torch.cuda.memory_allocated()
    for _ in spool.in_turn(4, lambda i: [waiting[i]]):
        assert torch.cuda.memory_allocated() <= before + (8 << 20)
    assert torch.cuda.memory_allocated() == before


def test_what_is_expected_is_pinned_before_it_comes(tmp_path: Path) -> None:
    spool, size = Spool(tmp_path, streams="pinned"), 3 << 20
    for _ in range(2):  # the second time it is still there
        spool.expect_activations([4 * size] * 4)
        assert spool._pinned is not None
        assert spool._pinned._pinning is not None
        spool._pinned._pinning.join()
        before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
        assert before >= 4 * 3 * 4 * size
        waiting = [spool.put_activation(torch.full((size,), float(i), device="cuda")) for i in range(12)]
        assert torch.cuda.host_memory_stats()["allocated_bytes.current"] == before
        assert [float(tensor.sum()) / size for tensor in waiting] == list(range(12))
        del waiting


def test_no_more_is_pinned_once_streams_come(tmp_path: Path) -> None:
    spool = Spool(tmp_path, streams="pinned")
    spool.expect_activations([1 << 20] * 100_000)  # 300 GiB
    assert float(spool.put_activation(torch.ones(5, device="cuda")).sum()) == 5
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] < 100 << 30
