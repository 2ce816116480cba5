"""Processes that torchrun started together: rank 0 does the work and speaks, the others help it where they can.

They meet in a store of torch.distributed, where a rank that waits looks now and then: signals and the failure of
another end the wait. The process group itself exists while they help, and no longer.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

from dotresize_fx.errors import DotresizeError, RanksError, UsageError

LOOK_EVERY = 0.1  # seconds
# Keys of the store, and what rank 0 calls for.
CALLED, FAILED = "called", "failed"
TO_HELP, TO_LEAVE = "to help", "to leave"


def rank_and_count() -> tuple[int, int]:
    """This process's rank and how many were launched, as torchrun says in the environment; (0, 1) without it."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), count) if count > 1 else (0, 1)


def one_is_enough(show: Callable[[str], None]) -> None:
    """Where one process does: rank 0 says so, if others were launched, and those leave with SystemExit(0)."""
    rank, count = rank_and_count()
    if rank > 0:
        raise SystemExit(0)
    if count > 1:
        show(f"{count} processes were started and this is work for one: the others leave")


class Launched:
    """Context manager around a run; ``rank`` of ``count``, (0, 1) where this process works alone.

    Entering chooses the card of this rank, if the device is CUDA, and ends the others at once where rank 0 is not
    ``helped``.
    Leaving with an exception lets the other ranks end too. What failed first is the reason: it is raised as it is on
    rank 0 and as RanksError elsewhere; ranks that failed later leave with SystemExit.

    Raises:
        UsageError: more processes were started than this machine has CUDA devices.
        RanksError: the processes do not find each other, or this torch lacks NCCL, or without CUDA gloo.
    """

    # They help one run of a script: what rank 0 does after it, it does alone.
    others_left = False

    def __init__(self, device: str, helped: bool, show: Callable[[str], None]) -> None:
        self.rank, self.count = (0, 1) if Launched.others_left else rank_and_count()
        self._device, self._helped, self._show = device, helped, show
        self._store: Any = None

    def __enter__(self) -> Self:
        if self.count > 1 and not self._helped:
            one_is_enough(self._show)
            Launched.others_left, self.count = True, 1
        if self.count == 1:
            return self
        self._choose_card()
        import torch.distributed as dist

        if not dist.is_backend_available(self._backend):  # before hours are spent
            raise RanksError(
                f"rank {self.rank}: this torch lacks {self._backend}, by which several processes work together: "
                "install one that has it, or start one process"
            )
        try:
            from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

            found, _, _ = next(rendezvous("env://"))
            self._store = PrefixStore("dotresize-fx", found)
        except (ImportError, RuntimeError, ValueError) as error:
            raise RanksError(f"rank {self.rank} does not find the others: {_said(error)}") from error
        return self

    @property
    def _backend(self) -> str:
        return "nccl" if self._device == "cuda" else "gloo"

    def _choose_card(self) -> None:
        if self._device != "cuda":
            return
        import torch

        here, cards = int(os.environ.get("LOCAL_WORLD_SIZE", self.count)), torch.cuda.device_count()
        if here > cards:
            raise UsageError(f"{here} processes were started for {cards} CUDA devices: start one a device")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", self.rank)))

    @contextlib.contextmanager
    def called(self) -> Iterator[None]:
        """The process group inside the block, one of the script's own if there is one; alone, nothing.

        On rank 0 this ends the others' wait.
        """
        if self.count == 1:
            yield
            return
        import torch.distributed as dist

        if self.rank == 0:
            self._store.set(CALLED, TO_HELP)
        made = not dist.is_initialized()
        if made:
            dist.init_process_group(self._backend, store=self._store, rank=self.rank, world_size=self.count)
        yield
        if made:  # after an exception this would wait for the others
            dist.destroy_process_group()

    def wait(self, check: Callable[[], None]) -> bool:
        """On other ranks: until rank 0 calls; False if it has no work for them. ``check`` runs meanwhile and may raise.

        Raises:
            SystemExit: another rank has failed.
        """
        while not self._store.check([CALLED]):
            check()
            if self._store.check([FAILED]):
                raise SystemExit(RanksError.exit_code)
            time.sleep(LOOK_EVERY)
        return bool(self._store.get(CALLED).decode() == TO_HELP)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.count == 1:
            return
        Launched.others_left = True
        if error is None or (isinstance(error, SystemExit) and not error.code):
            if self.rank == 0 and not self._store.check([CALLED]):
                self._store.set(CALLED, TO_LEAVE)
            return
        failure = isinstance(error, Exception)  # not a signal, which the launcher sends to all
        first = (failure or self.rank == 0) and self._is_first_to_fail()
        if failure and not first:
            raise SystemExit(RanksError.exit_code) from error
        if failure and self.rank > 0:
            raise RanksError(f"rank {self.rank}: {_said(error)}") from error

    def _is_first_to_fail(self) -> bool:
        """Tell the others; False too where the one that kept the store has gone, which only a failure explains."""
        with contextlib.suppress(RuntimeError):
            return bool(self._store.add(FAILED, 1) == 1)
        return self.rank == 0


def _said(error: BaseException) -> str:
    """What an error says in one line, with its type where it is not one of ours."""
    line = next(iter(str(error).strip().splitlines()), "")
    return line if isinstance(error, DotresizeError) else f"{type(error).__name__}: {line}"
