"""What reads a cut stream behind its norms, sublayer by sublayer and behind the last one, as the sweep walks."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import torch

from dotresize_fx.activation_stream import ActivationStream
from dotresize_fx.entry_refit import Entry, head_entry, refit_entries
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.head_repair import HeadEntrance
from dotresize_fx.slim_stream import SlimStream

Seen = Mapping[torch.fx.Node, list[torch.Tensor]]


class StreamReaders:
    """Finds and refits them; ``cut`` None is a stream that was not cut, which nothing has to be refitted to.

    masks, measuring, pull: see :func:`dotresize_fx.entry_refit.refit_entries`. Without ``refit`` no entries are found.
    """

    def __init__(
        self,
        cut: SlimStream | None,
        slim: ActivationStream,
        dense: ActivationStream,
        masks: Sequence[torch.Tensor | None],
        measuring: Container[int],
        *,
        pull: float,
        refit: bool,
    ) -> None:
        self.cut, self.slim, self.dense = cut, slim, dense
        self.masks, self.measuring, self.pull, self.refits = masks, measuring, pull, refit

    def positions(self, stop: int) -> list[int]:
        """Where linears that read the stream stand, from where the slim model was run to up to ``stop``."""
        places = [self._index(name) for name in self.cut.readers] if self.cut else []
        return [place for place in places if self.slim.position <= place < stop]

    def entries(self, stop: int) -> list[Entry]:
        """Those of them that read it behind a norm and have weights of their own in both models."""
        slim, dense = self.slim.execution.graph, self.dense.execution.graph
        found = [Entry.of(slim, dense, name) for name in self._normed(stop)]
        return [entry for entry in found if entry is not None]

    def _normed(self, stop: int) -> list[str]:
        if self.cut is None or not self.refits:
            return []
        names = sorted(self.cut.normed, key=self._index)
        return [name for name in names if self.slim.position <= self._index(name) < stop]

    def _index(self, name: str) -> int:
        return self.slim.execution.index[self.slim.execution.graph.node(name)]

    def refit(self, entries: Sequence[Entry], seen: Seen) -> None:
        """In place; ``seen``: by node what the dense model has there, one value per batch."""
        if refit_entries(self.slim, entries, seen, self.masks, self.measuring, self.pull):
            self.slim.execution = Execution(self.slim.execution.graph)

    def refit_last(self) -> HeadEntrance | None:
        """Refit what reads the stream behind the last sublayer: the head, or the matrix in front of a tied one.

        Returns that matrix's way to the head, for its repair.
        """
        stop = len(self.slim.execution.nodes)
        graph = self.slim.execution.graph
        made = [head_entry(graph, self.dense, name, self.masks) for name in self._normed(stop)]
        tied = [entry for entry in made if entry is not None]
        entries = [*self.entries(stop), *tied]
        seen: dict[torch.fx.Node, list[torch.Tensor]] = {entry.dense: [] for entry in entries}
        execution = self.dense.execution
        last = max((execution.position(node) for node in seen), default=-1) + 1
        if last <= self.dense.position:
            return None
        for environment in self.dense.environments:
            values = execution.run(environment, self.dense.position, last, keep=list(seen))
            for node, kept in seen.items():
                kept.append(values[node])
        self.dense.position = last
        self.refit(entries, seen)
        entry = next((entry for entry in tied if entry.head), None)
        if entry is None:
            return None
        self.slim.advance(max(self.slim.position, self._index(entry.reader)))
        narrow, wide = graph.op(entry.head), execution.graph.op(entry.head)
        tables = (
            (graph.weight(narrow).detach(), graph.bias(narrow)),
            (execution.graph.weight(wide).detach(), execution.graph.bias(wide)),
        )
        return HeadEntrance(self.slim, graph.node(entry.reader), seen[entry.dense], self.masks, *tables)
