"""Weights held and read ahead: each as often as it must be, within the limit, and the same numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from dotresize_fx.errors import BadWeightsError
from dotresize_fx.offload.held_weights import HeldWeights
from dotresize_fx.offload.lazy_tensor import LazyTensor

SIZE = 40  # bytes of one


@pytest.fixture
def reads() -> list[str]:
    """Names in the order in which they were read."""
    return []


@pytest.fixture
def lazy(reads: list[str]) -> Callable[[str], LazyTensor]:
    """A tensor of that name, ten ones; "broken" says so when it is read."""

    def make(name: str) -> LazyTensor:
        def source() -> torch.Tensor:
            reads.append(name)
            if name == "broken":
                raise BadWeightsError("broken")
            return torch.ones(10)

        return LazyTensor(source, (10,), torch.float32)

    return make


def test_what_was_asked_for_last_is_held_up_to_a_limit(lazy: Callable[[str], LazyTensor], reads: list[str]) -> None:
    held = HeldWeights(2 * SIZE)
    a, b, c = map(lazy, "abc")
    for one in (a, b, a, c, b, a):  # what is read ahead is not read for a while, and must not go for that
        assert torch.equal(held.read(one), torch.ones(10))
    assert reads == ["a", "b", "c", "a"]
    assert held.holds(a, torch.float32)
    assert not held.holds(a, torch.bfloat16)
    assert not held.holds(b, torch.float32)
    assert HeldWeights().read(a) is not HeldWeights().read(a)


def test_half_as_precise_ones_take_half_the_room(lazy: Callable[[str], LazyTensor], reads: list[str]) -> None:
    held = HeldWeights(2 * SIZE)
    many = list(map(lazy, "abcd"))
    for one in (*many, *many):
        assert held.read(one, torch.bfloat16).dtype is torch.bfloat16
    assert reads == list("abcd")


def test_what_comes_next_is_read_meanwhile(lazy: Callable[[str], LazyTensor], reads: list[str]) -> None:
    """By another thread, once."""
    held = HeldWeights(4 * SIZE)
    a, b = map(lazy, "ab")
    threads = set[int]()

    def source() -> torch.Tensor:
        threads.add(threading.get_ident())
        return torch.zeros(10)

    c = LazyTensor(source, (10,), torch.float32)
    held.read(a)
    held.read_ahead([(b, torch.float32), (c, torch.float32)])
    assert torch.equal(held.read(c), torch.zeros(10))
    held.read(b)
    assert reads == ["a", "b"]
    assert threads
    assert threading.get_ident() not in threads


def test_what_is_forgotten_is_read_again(lazy: Callable[[str], LazyTensor], reads: list[str]) -> None:
    held, a = HeldWeights(2 * SIZE), lazy("a")
    held.read(a)
    held.forget()
    held.read(a)
    assert reads == ["a", "a"]


def test_what_could_not_be_read_ahead_is_read_when_it_is_needed() -> None:
    """Memory may have been short at that moment."""
    tries = []

    def source() -> torch.Tensor:
        tries.append(len(tries))
        if len(tries) == 1:
            raise RuntimeError("out of memory")
        return torch.ones(10)

    held, lazy = HeldWeights(2 * SIZE), LazyTensor(source, (10,), torch.float32)
    held.read_ahead([(lazy, torch.float32)])
    assert torch.equal(held.read(lazy), torch.ones(10))
    assert torch.equal(held.read(lazy), torch.ones(10))


def test_broken_weights_are_told_to_who_reads_them(lazy: Callable[[str], LazyTensor]) -> None:
    held, broken = HeldWeights(2 * SIZE), lazy("broken")
    held.read_ahead([(broken, torch.float32)])
    with pytest.raises(BadWeightsError, match="broken"):
        held.read(broken)
