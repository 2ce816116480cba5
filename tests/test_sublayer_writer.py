"""Finished sublayers reach the journal and then stay in files, whether they are written beside other work or not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind, Op
from dotresize_fx.journal import Journal
from dotresize_fx.offload.lazy_tensor import LazyTensor, in_memory
from dotresize_fx.offload.stored_tensors import Spool, lazy_tensors
from dotresize_fx.sublayer_writer import SublayerWriter

Trace = Callable[..., FxGraph]


class Waiting(Journal):
    """Writes once it is told to, and fails if it is told that."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, {})
        self.go_on, self.broken = threading.Event(), False

    def write_sublayer(self, *given: Any) -> Any:
        assert self.go_on.wait(60)
        if self.broken:
            raise OSError("no room")
        return super().write_sublayer(*given)


def two_layers(trace: Trace, folder: Path) -> tuple[FxGraph, Op, Op]:
    graph = trace(lambda m, x: m.b(m.a(x)), (2, 4), a=nn.Linear(4, 4, bias=False), b=nn.Linear(4, 4, bias=False))
    graph.spool = Spool(folder)
    first, second = (op for op in graph.ops if op.kind is Kind.LINEAR)
    return graph, first, second


def change(graph: FxGraph, op: Op, writer: SublayerWriter, behind: Callable[[], None] = lambda: None) -> None:
    with writer:
        writer.begin()
        graph.set_weight(op, torch.eye(4))
        writer.put(0, [], {})
        behind()


@pytest.mark.parametrize("beside", [False, True])
def test_what_changed_is_in_the_journal_and_in_files_alone(trace: Trace, tmp_path: Path, beside: bool) -> None:
    graph, first, second = two_layers(trace, tmp_path)
    journal = Journal(tmp_path / "journal", {})
    with SublayerWriter(graph, journal, beside=beside) as writer:
        writer.begin()
        graph.set_weight(first, torch.eye(4))
        writer.put(3, [], {"a map": {}})
    left = graph.weight(first)
    assert isinstance(left, LazyTensor)
    assert torch.equal(in_memory(left), torch.eye(4))
    assert not isinstance(graph.weight(second), LazyTensor)
    (file,) = (tmp_path / "journal").glob("*.safetensors")
    assert len(lazy_tensors(file)) == 1
    finished = journal.sublayer(3, [])
    assert finished is not None
    assert finished.maps == {"a map": {}}


def change_next(graph: FxGraph, op: Op, weight: torch.Tensor, writer: SublayerWriter, journal: Waiting) -> None:
    """The sublayer behind one that is under way, and written before this one is put."""
    under_way = writer._under_way
    writer.begin()
    graph.set_weight(op, weight)
    journal.go_on.set()
    assert under_way is not None
    under_way.result()
    writer.put(1, [], {})


def test_a_sublayer_is_written_while_the_next_is_under_way(trace: Trace, tmp_path: Path) -> None:
    graph, first, second = two_layers(trace, tmp_path)
    journal = Waiting(tmp_path / "journal")
    writer = SublayerWriter(graph, journal, beside=True)

    def behind() -> None:
        assert not isinstance(graph.weight(first), LazyTensor)
        change_next(graph, second, 2 * torch.eye(4), writer, journal)
        assert isinstance(graph.weight(first), LazyTensor)

    change(graph, first, writer, behind)
    assert [len(lazy_tensors(file)) for file in sorted((tmp_path / "journal").glob("*.safetensors"))] == [1, 1]
    for op, wanted in ((first, torch.eye(4)), (second, 2 * torch.eye(4))):
        assert isinstance(graph.weight(op), LazyTensor)
        assert torch.equal(in_memory(graph.weight(op)), wanted)


def test_what_changes_again_meanwhile_is_not_put_back(trace: Trace, tmp_path: Path) -> None:
    graph, first, _ = two_layers(trace, tmp_path)
    journal = Waiting(tmp_path / "journal")
    writer = SublayerWriter(graph, journal, beside=True)
    change(graph, first, writer, lambda: change_next(graph, first, 3 * torch.eye(4), writer, journal))
    assert torch.equal(in_memory(graph.weight(first)), 3 * torch.eye(4))


@pytest.mark.parametrize("beside", [False, True])
def test_what_cannot_be_written_is_told(trace: Trace, tmp_path: Path, beside: bool) -> None:
    graph, first, _ = two_layers(trace, tmp_path)
    journal = Waiting(tmp_path / "journal")
    journal.broken = True
    journal.go_on.set()
    with pytest.raises(OSError, match="no room"):
        change(graph, first, SublayerWriter(graph, journal, beside=beside))
    assert torch.equal(in_memory(graph.weight(first)), torch.eye(4))


def test_what_went_wrong_first_is_told(trace: Trace, tmp_path: Path) -> None:
    graph, first, _ = two_layers(trace, tmp_path)
    journal = Waiting(tmp_path / "journal")
    journal.broken = True

    def fail() -> None:
        journal.go_on.set()
        raise KeyError("before")

    with pytest.raises(KeyError):
        change(graph, first, SublayerWriter(graph, journal, beside=True), fail)


@pytest.mark.gpu
def test_a_gpu_s_weights_are_copied_once_they_are_made(trace: Trace, tmp_path: Path) -> None:
    n = 4096
    graph = trace(lambda m, x: m.a(x), (2, n), a=nn.Linear(n, n, bias=False))
    graph.to("cuda")
    graph.spool = Spool(tmp_path)
    (op,) = (op for op in graph.ops if op.kind is Kind.LINEAR)
    with SublayerWriter(graph, Journal(tmp_path / "journal", {}), beside=True) as writer:
        for number in range(3):
            writer.begin()
            made = torch.eye(n, device="cuda") * (number + 1)
            for _ in range(20):  # the copy has to wait for these
                made = made @ torch.eye(n, device="cuda")
            graph.set_weight(op, made)
            writer.put(number, [], {})
    left = graph.weight(op)
    assert isinstance(left, LazyTensor)
    assert left.is_cuda
    assert torch.equal(left.read(), 3 * torch.eye(n, device="cuda"))
    assert torch.cuda.memory_allocated() < 3 * 4 * n * n
