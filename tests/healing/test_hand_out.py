"""What rank 0 hands to the others arrives to the bit, and heals to the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from dotresize_fx import hand_out
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.healing import heal


class Wire:
    """Stands for Ranks: what it is given while ``giving`` it hands out in the same order later."""

    count = 2

    def __init__(self) -> None:
        self.giving, self.sent = True, list[torch.Tensor]()

    def share_first(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            if self.giving:
                self.sent.append(tensor.detach().clone())
            else:
                tensor.copy_(self.sent.pop(0))


def test_both_programs_arrive(
    dense: FxGraph,
    slim: FxGraph,
    batches: list[Any],
    held_out: list[Any],
    options: Callable[..., Any],
    same_weights: Callable[..., bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wire = Wire()
    monkeypatch.setattr(hand_out, "Ranks", lambda: wire)
    given = hand_out.Handed(dense, slim.copy(), (batches, held_out), "decoder")
    hand_out.give(given)
    sizes = [tensor.numel() for tensor in wire.sent]
    wire.giving = False
    taken = hand_out.take("cpu")
    assert wire.sent == []
    assert taken.task == "decoder"
    for one, other in zip((dense, slim), (taken.dense, taken.slim), strict=True):
        assert str(one.nodes) == str(other.nodes)
        assert same_weights(one, other)
        assert one.program.constants.keys() == other.program.constants.keys()
    for part, arrived in zip(given.sources, taken.sources, strict=True):
        for one, other in zip(part, arrived, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
    # What was not cut is one tensor in both programs, as is a tied table, and crosses once.
    stored = [tensor for graph in (dense, slim) for tensor in graph.program.state_dict.values()]
    assert sum(sizes[2:]) == sum({tensor.data_ptr(): tensor.numel() for tensor in stored}.values())
    results = [heal(h.dense, h.slim, *h.sources, options(steps=6), task=h.task) for h in (given, taken)]
    assert results[0].history[-1][2] == results[1].history[-1][2]
    assert same_weights(given.slim, taken.slim)


def test_alone_nothing_is_handed_out(dense: FxGraph) -> None:
    hand_out.give(hand_out.Handed(dense, dense, (), "decoder"))
