"""How launched processes wait, leave and fail: two of them as objects that share a store, no group is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dotresize_fx.errors import ModelNotFoundError, RanksError, UsageError
from dotresize_fx.launched import Launched

Make = Callable[..., Launched]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Make:
    """``launched(rank, helped=True, device="cpu")``: one of two processes."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr("torch.distributed.rendezvous", lambda url: iter([(store, 0, 2)]))
    monkeypatch.setattr(Launched, "others_left", False)
    monkeypatch.setenv("WORLD_SIZE", "2")

    def make(rank: int, helped: bool = True, device: str = "cpu") -> Launched:
        monkeypatch.setattr(Launched, "others_left", False)
        monkeypatch.setenv("RANK", str(rank))
        return Launched(device, helped, lambda said: None)

    return make


def check() -> None:
    pass


def test_without_a_launcher_one_process_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with Launched("cpu", True, lambda said: None) as alone, alone.called():
        assert (alone.rank, alone.count) == (0, 1)
        assert not torch.distributed.is_initialized()


def test_where_the_first_needs_no_help_the_others_leave(launched: Make) -> None:
    with launched(0) as first:
        assert (first.rank, first.count) == (0, 2)
    with launched(1) as second:
        assert second.wait(check) is False


@pytest.mark.parametrize("helped", [True, False])
def test_a_second_run_of_the_first_rank_is_alone(launched: Make, helped: bool) -> None:
    with launched(0, helped):
        pass
    with Launched("cpu", True, lambda said: None) as again:
        assert again.count == 1


def test_a_failure_of_the_first_rank_ends_the_wait_for_it(launched: Make) -> None:
    with pytest.raises(ModelNotFoundError), launched(0):
        raise ModelNotFoundError("no such model")
    with pytest.raises(SystemExit) as ended, launched(1) as second:
        second.wait(check)
    assert ended.value.code == RanksError.exit_code


def test_a_signal_to_the_first_rank_ends_the_wait_for_it(launched: Make) -> None:
    with pytest.raises(SystemExit) as ended, launched(0):
        raise SystemExit(130)
    assert ended.value.code == 130
    with pytest.raises(SystemExit) as ended, launched(1) as second:
        second.wait(check)
    assert ended.value.code == RanksError.exit_code


def test_a_wait_is_broken_off_by_what_is_checked(launched: Make) -> None:
    def arrived() -> None:
        raise SystemExit(143)

    with pytest.raises(SystemExit) as ended, launched(1) as second:
        second.wait(arrived)
    assert ended.value.code == 143


@pytest.mark.parametrize(
    ("error", "said"),
    [(ValueError("one\ntwo"), "rank 1: ValueError: one"), (UsageError("another run"), "rank 1: another run")],
)
def test_what_failed_first_is_the_reason(launched: Make, error: Exception, said: str) -> None:
    with pytest.raises(RanksError) as caught, launched(1):
        raise error
    assert str(caught.value) == said
    with pytest.raises(SystemExit) as ended, launched(0):
        raise RanksError("the connection to another process broke")
    assert ended.value.code == RanksError.exit_code


def test_more_processes_than_cards(launched: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError) as caught, launched(0, device="cuda"):
        pass
    assert str(caught.value) == "2 processes were started for 1 CUDA devices: start one a device"


@pytest.mark.parametrize(("device", "backend"), [("cuda", "nccl"), ("cpu", "gloo")])
def test_a_torch_that_lacks_what_they_talk_by(
    launched: Make, monkeypatch: pytest.MonkeyPatch, device: str, backend: str
) -> None:
    """Told before anything is loaded."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: name != backend)
    with pytest.raises(RanksError, match=f"rank 1: this torch lacks {backend}, .* or start one process"):
        launched(1, device=device).__enter__()


def test_every_rank_takes_its_own_card(launched: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda _: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with launched(1, device="cuda"):
        assert taken == [1]
