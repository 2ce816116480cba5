"""Finished sublayers on their way into files, on a GPU beside what is computed meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.journal import Journal
from dotresize_fx.offload.lazy_tensor import in_memory
from dotresize_fx.sweep import SweptRegion

# By name what changed, and it in a file, which is left of it.
Left = list[tuple[str, torch.Tensor, torch.Tensor]]


class SublayerWriter:
    """Writes to the journal, if there is one, what changes in ``graph``; where this has a spool, what changed stays in
    files alone.

    ``beside``: another thread writes, one sublayer at a time; its weights stay in memory until the next one is put.
    Inside a ``with``, at whose end all is written.
    """

    def __init__(self, graph: FxGraph, journal: Journal | None, *, beside: bool) -> None:
        self._graph, self._journal = graph, journal
        self._thread = ThreadPoolExecutor(1, "write") if beside else None
        self._under_way: Future[Left] | None = None
        # Weakly, so that what is replaced goes at once.
        self._before: dict[str, ref[torch.Tensor]] = {}
        self._copying: torch.cuda.Stream | None = None

    def __enter__(self) -> SublayerWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        if kind is None:  # else what went wrong first is told
            self._settle()

    def begin(self) -> None:
        """A sublayer is about to change."""
        self._before = {name: ref(weight) for name, weight in self._graph.program.state_dict.items()}

    def put(self, number: int, swept: Sequence[SweptRegion], maps: Mapping[str, Mapping[str, Any]]) -> None:
        """It changed.

        Raises:
            OSError: it, or the one before it, cannot be written.
        """
        weights, before = self._graph.program.state_dict, self._before
        changed = {name: w for name, w in weights.items() if name not in before or before[name]() is not w}
        self._settle()
        if self._thread is None:
            self._replace(self._written(number, swept, maps, changed, None))
            return
        made = torch.cuda.current_stream().record_event() if any(w.is_cuda for w in changed.values()) else None
        self._under_way = self._thread.submit(self._written, number, swept, dict(maps), changed, made)

    def _settle(self) -> None:
        """What is under way is written."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            self._replace(under_way.result())

    def _replace(self, left: Left) -> None:
        weights = self._graph.program.state_dict
        for name, weight, stored in left:
            if weights.get(name) is weight:  # else another sublayer changed it since then
                weights[name] = torch.nn.Parameter(stored, requires_grad=False)

    def _written(
        self,
        number: int,
        swept: Sequence[SweptRegion],
        maps: Mapping[str, Mapping[str, Any]],
        changed: Mapping[str, torch.Tensor],
        made: torch.cuda.Event | None,
    ) -> Left:
        """Nothing is left of a graph without a spool, whose weights stay where they are."""
        spool = self._graph.spool
        with self._on_a_stream_of_its_own(made):
            stored = self._journal.write_sublayer(number, swept, maps, changed) if self._journal else {}
            if spool is None:
                return []
            if not self._journal:
                stored = {name: spool.put(in_memory(weight).contiguous()) for name, weight in changed.items()}
        return [(name, weight, stored[name].to(weight.device)) for name, weight in changed.items()]

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
