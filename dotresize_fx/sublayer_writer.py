"""Finished sublayers on their way into files, on a GPU beside what is computed meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.journal import Journal
from dotresize_fx.lazy_tensor import in_memory
from dotresize_fx.sweep import SweptRegion


class SublayerWriter:
    """Writes to the journal, if there is one, what changes in ``graph``; where this has a spool, what changed stays in
    files alone.

    ``beside``: another thread does, one sublayer at a time; the weights stay in memory until then. Inside a ``with``,
    at whose end all is written.
    """

    def __init__(self, graph: FxGraph, journal: Journal | None, *, beside: bool) -> None:
        self._graph, self._journal = graph, journal
        self._thread = ThreadPoolExecutor(1, "write") if beside else None
        self._under_way: Future[None] | None = None
        # Weakly, so that what is replaced goes at once.
        self._before: dict[str, ref[torch.Tensor]] = {}
        self._put: dict[str, ref[torch.Tensor]] = {}
        self._copying: torch.cuda.Stream | None = None

    def __enter__(self) -> SublayerWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is not None:
            if kind is not None and self._under_way is not None:
                wait([self._under_way])  # what went wrong first is told
            self._thread.shutdown()
        if kind is None:
            self._settle()

    def begin(self) -> None:
        """A sublayer is about to change."""
        self._before = {name: ref(weight) for name, weight in self._graph.program.state_dict.items()}

    def put(self, number: int, swept: Sequence[SweptRegion], maps: Mapping[str, Mapping[str, Any]]) -> None:
        """It changed.

        Raises:
            OSError: it, or the one before it, cannot be written.
        """
        weights = self._graph.program.state_dict
        changed = {name: weight for name, weight in weights.items() if self._has_changed(name, weight)}
        self._settle()
        if self._thread is None:
            self._write(number, swept, dict(maps), changed, None)
            return
        made = torch.cuda.current_stream().record_event() if any(w.is_cuda for w in changed.values()) else None
        self._under_way = self._thread.submit(self._write, number, swept, dict(maps), changed, made)

    def _has_changed(self, name: str, weight: torch.Tensor) -> bool:
        return all(known.get(name, _nothing)() is not weight for known in (self._before, self._put))

    def _settle(self) -> None:
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()

    def _write(
        self,
        number: int,
        swept: Sequence[SweptRegion],
        maps: Mapping[str, Mapping[str, Any]],
        changed: dict[str, torch.Tensor],
        made: torch.cuda.Event | None,
    ) -> None:
        weights, spool = self._graph.program.state_dict, self._graph.spool
        with self._on_a_stream_of_its_own(made):
            stored = self._journal.write_sublayer(number, swept, maps, changed) if self._journal else {}
            while spool is not None and changed:
                name, weight = changed.popitem()
                left = stored[name].to(weight.device) if self._journal else spool.put(in_memory(weight).contiguous())
                parameter = torch.nn.Parameter(left, requires_grad=False)
                self._put[name] = ref(parameter)
                if weights.get(name) is weight:  # else another sublayer changed it since then
                    weights[name] = parameter

    @contextmanager
    def _on_a_stream_of_its_own(self, made: torch.cuda.Event | None) -> Iterator[None]:
        """Copies wait for what they copy, and not for what is computed behind it."""
        if made is None:
            yield
            return
        self._copying = self._copying or torch.cuda.Stream(made.device)  # type: ignore[no-untyped-call]
        self._copying.wait_event(made)
        with torch.cuda.device(made.device), torch.cuda.stream(self._copying):
            yield


def _nothing() -> None:
    return None
