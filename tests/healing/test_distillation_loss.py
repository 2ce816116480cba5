"""The loss: chunks are the whole, padding is nothing, and what is left out does not change gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dotresize_fx.errors import UsageError
from dotresize_fx.healing.distillation_loss import Batch, divergence, relative_error

Weights = tuple[torch.Tensor | None, torch.Tensor | None]


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


class Case:
    """33 rows, a vocabulary of 50; ``learned`` are what gets gradients."""

    def __init__(self, head: bool, bias: bool) -> None:
        width, dense_width = (12, 16) if head else (50, 50)
        self.states, self.dense_states = draw(33, width, seed=0), draw(33, dense_width, seed=1).detach()
        self.head: Weights = (draw(50, width, seed=2) if head else None, draw(50, seed=3) if head and bias else None)
        dense_bias = draw(50, seed=5).detach() if head and bias else None
        self.dense_head: Weights = (draw(50, 16, seed=4).detach() if head else None, dense_bias)
        self.learned = [part for part in (self.states, *self.head) if part is not None]

    def plain(self, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        q, p = (
            (states if weight is None else torch.nn.functional.linear(states, weight, bias)).log_softmax(-1)
            for states, (weight, bias) in ((self.states, self.head), (self.dense_states, self.dense_head))
        )
        return torch.nn.functional.kl_div(q[rows], p[rows], reduction="sum", log_target=True)

    def chunked(self, **changed: Any) -> torch.Tensor:
        return divergence(self.states, self.head, self.dense_states, self.dense_head, **changed)

    def gradients(self, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss * 0.3, self.learned)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dotresize_fx.healing.distillation_loss.POSITIONS_AT_ONCE", 7)


@pytest.fixture(params=[(True, True), (True, False), (False, False)], ids=["bias", "plain", "logits"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


def test_chunks_give_the_loss_and_gradients_of_the_whole(case: Case) -> None:
    plain, chunked = case.plain(), case.chunked()
    torch.testing.assert_close(chunked, plain)
    torch.testing.assert_close(case.gradients(chunked), case.gradients(plain))


def test_gradients_need_no_sum(case: Case) -> None:
    unmeasured = case.chunked(measured=False)
    assert unmeasured.item() == 0
    torch.testing.assert_close(case.gradients(unmeasured), case.gradients(case.plain()))


def test_without_gradients_none_are_made(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[None] = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda *args, **rest: (made.append(None), zeros_like(*args, **rest))[1])
    with torch.no_grad():
        torch.testing.assert_close(case.chunked(), case.plain().detach())
    assert not made


@pytest.mark.parametrize("measured", [True, False])
def test_masked_rows_are_indexed_rows(case: Case, measured: bool) -> None:
    padding = torch.arange(33) % 5 == 2
    masked = case.chunked(padding=padding, measured=measured)
    plain = case.plain(~padding)
    torch.testing.assert_close(masked, plain if measured else torch.zeros(()))
    torch.testing.assert_close(case.gradients(masked), case.gradients(plain))


def test_padding_may_hold_anything() -> None:
    padding = torch.tensor([False, False, True, False, True, False])
    states = draw(2, 3, 8, seed=0)
    wild = torch.where(padding.view(2, 3, 1), torch.nan, states.detach())
    batch, dense_states, weight = Batch({}, padding), draw(6, 8, seed=1).detach(), draw(20, 8, seed=2)
    found = batch.tokens(wild)
    assert torch.equal(found[~padding], states.detach().flatten(0, 1)[~padding])
    loss = divergence(found, (weight, None), dense_states, (weight.detach(), None), padding=padding)
    expected = divergence(found[~padding], (weight, None), dense_states[~padding], (weight.detach(), None))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, weight), torch.autograd.grad(expected, weight))
    targets = batch.tokens(dense_states.view(2, 3, 8))
    masked = relative_error(batch.tokens(states), targets)
    plain = relative_error(states.flatten(0, 1)[~padding], dense_states[~padding])
    torch.testing.assert_close(masked, plain)
    torch.testing.assert_close(torch.autograd.grad(masked, states), torch.autograd.grad(plain, states))
    assert Batch({}, None).tokens(states[:, 0]).shape == (2, 8)
    assert Batch({}, None).tokens(states).shape == (6, 8)


def test_relative_error_is_by_token() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.6, 0.8]])
    assert float(relative_error(expected * torch.tensor([[1.1], [3.0]]), expected)) == pytest.approx(0.01 + 4)
    with pytest.raises(UsageError, match="width was cut"):
        relative_error(expected, expected[:, :1])
