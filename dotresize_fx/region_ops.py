"""A region's linears, as statistics and fits see them in any form of the graph."""

from __future__ import annotations

import torch

from dotresize_fx.expert_statistics import ExpertGrams, expert_statistics
from dotresize_fx.gram import GramAccumulator, RegionStatistics, check_finite
from dotresize_fx.graph import Graph, Kind, Op
from dotresize_fx.regions import Region, RegionKind


class RegionOps:
    """``reader`` is the region's only reader; queries and keys have none, since the attention reads them."""

    def __init__(self, graph: Graph, region: Region) -> None:
        self.graph, self.region = graph, region
        self.reader = graph.op(region.readers[0]) if region.readers else None
        self.writers = [graph.op(name) for name in region.writers]
        self.biased = self.reader is not None and graph.bias(self.reader) is not None

    @property
    def products(self) -> list[Op]:
        """The experts' products that write the region: its biases, which are looked up, are none."""
        return [op for op in self.writers if op.kind is Kind.EXPERTS]

    def new_sums(self) -> GramAccumulator:
        """For :meth:`add_rows`."""
        return ExpertGrams(self.region.heads) if self.region.kind is RegionKind.EXPERTS else GramAccumulator()

    def reader_weight(self) -> torch.Tensor:
        """(out, n) float64, or (out, n + 1) with the bias as last column."""
        assert self.reader is not None
        weight = self.graph.weight(self.reader).double()
        bias = self.graph.bias(self.reader)
        return weight if bias is None else torch.cat([weight, bias.double()[:, None]], 1)

    def statistics(
        self, read: GramAccumulator, entered: GramAccumulator, near: torch.Tensor | None = None
    ) -> RegionStatistics:
        """Of sums over what the reader reads (and a constant one, where it has a bias) and what the writers read (and a
        constant one), either of which may be empty, and of how alike rotary pairs turn. What is read is means from then
        on, so that the statistics need no copy of it.

        Raises:
            SolverError: activations are infinite or NaN.
        """
        for sums in (read, entered):
            check_finite(sums.gram, self.region)
        if isinstance(read, ExpertGrams):
            assert self.reader is not None
            return expert_statistics(read, self.graph.weight(self.reader).double())
        read.to_means()
        gram = read.gram
        weight = self.reader_weight() if self.reader is not None else None
        if self.biased and weight is not None:
            gram, weight = gram[:-1, :-1], weight[:, :-1]
        return RegionStatistics(
            tokens=max(read.tokens, entered.tokens),
            gram=gram,
            reader_weight=weight,
            entry_gram=None if self.reader is not None else entered.gram / max(entered.tokens, 1),
            coherence=near,
            writer_weights={} if self.reader else self.writer_weights(),
        )

    def writer_weights(self) -> dict[str, torch.Tensor]:
        """(n, d + 1) float64 by op name, the bias as last column."""
        return {op.name: self._writer_weight(op.name) for op in self.writers}

    def _writer_weight(self, name: str) -> torch.Tensor:
        op = self.graph.op(name)
        weight, bias = self.graph.weight(op).double(), self.graph.bias(op)
        column = weight.new_zeros(len(weight)) if bias is None else bias.double()
        return torch.cat([weight, column[:, None]], 1)
