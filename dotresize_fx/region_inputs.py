"""What a region's linears see while a program runs: the nodes to watch, and the statistics that their values give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dotresize_fx.expert_statistics import ExpertGrams, expert_statistics
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import GramAccumulator, RegionStatistics, check_finite, token_rows, with_ones
from dotresize_fx.graph import Kind, Op
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.rotary_coherence import coherence

Values = Mapping[torch.fx.Node, Any]


class RegionInputs:
    """Watches one region of ``graph``: what its reader reads and puts out, and what its writers read.

    ``reader`` is the region's only reader; queries and keys have none, since the attention reads them. There ``entry``,
    the one value that all writers read, is watched instead. Node names stay valid while other regions' maps are folded.
    """

    def __init__(self, graph: FxGraph, region: Region) -> None:
        self.graph, self.region = graph, region
        self.reader = graph.op(region.readers[0]) if region.readers else None
        self.writers = [graph.op(name) for name in region.writers]
        self.entry = self.hidden = self.output = None
        if self.reader is None:
            self.entry = graph.node(self.writers[0].inputs[0].name)
        if self.reader is not None:
            self.hidden, self.output = graph.node(self.reader.inputs[0].name), graph.node(self.reader.name)
        self.biased = self.reader is not None and graph.bias(self.reader) is not None
        self.ends: torch.fx.Node | None = None
        self.origin: torch.fx.Node | None = None
        if region.kind is RegionKind.EXPERTS:
            self.ends, self.origin = self._routing()
        self.tables: tuple[torch.fx.Node, ...] = ()
        self.visible: torch.fx.Node | None = None
        if region.symmetry is Symmetry.ROTARY_PAIRS and region.layout is not None:
            # The queries' cosines and sines; keys have the same, or others like them.
            self.tables = tuple(graph.node(name) for name, _ in region.layout.tables[:2])
            seen = graph.op(region.attention).inputs[3:]
            self.visible = graph.node(seen[0].name) if seen else None

    @property
    def nodes(self) -> list[torch.fx.Node]:
        """What to keep of a run."""
        watched = (self.entry, self.hidden, self.output, *self.routing, *self.turning)
        return [node for node in watched if node is not None]

    @property
    def products(self) -> list[Op]:
        """The experts' products that write the region: its biases, which are looked up, are none."""
        return [op for op in self.writers if op.kind is Kind.EXPERTS]

    @property
    def routing(self) -> list[torch.fx.Node]:
        """What says which expert, and which token, each row is of."""
        return [node for node in (self.ends, self.origin) if node is not None]

    def _routing(self) -> tuple[torch.fx.Node | None, torch.fx.Node | None]:
        """Of experts: where each one's rows end, and of which token each row is, where a gather says so.

        Neither where each expert sees all rows.
        """
        assert self.reader is not None
        if len(self.reader.inputs) == 1:
            return None, None
        rows = self.graph.node(self.products[0].inputs[0].name)
        index: Any = rows.args[1] if rows.target is torch.ops.aten.index.Tensor else ()
        origin = index[0] if len(index) == 1 and isinstance(index[0], torch.fx.Node) else None
        return self.graph.node(self.reader.inputs[1].name), origin

    def new_sums(self) -> GramAccumulator:
        """For :meth:`add_rows`."""
        return ExpertGrams(self.region.heads) if self.region.kind is RegionKind.EXPERTS else GramAccumulator()

    def add_rows(
        self, sums: GramAccumulator, values: Values, mask: torch.Tensor | None, **others: torch.Tensor
    ) -> None:
        """What the reader reads, with what goes with each row; rows of padding are left out."""
        if not isinstance(sums, ExpertGrams) or self.hidden is None:
            sums.add(self.read_rows(values, mask), **others)
            return
        real = None
        if self.ends is None:
            rows = values[self.hidden]
            if mask is not None and mask.numel() == rows.shape[1]:  # a row a token
                real = mask.reshape(-1).bool()
            sums.add_of_all(rows, real)
            return
        if mask is not None and self.origin is not None:
            real = mask.reshape(-1).bool()[values[self.origin]]
        sums.add_routed(values[self.hidden], values[self.ends], real)

    @property
    def turning(self) -> list[torch.fx.Node]:
        """What :meth:`coherence` is told from."""
        return [node for node in (*self.tables, self.visible) if node is not None]

    def read_rows(self, values: Values, mask: torch.Tensor | None) -> torch.Tensor:
        """(tokens, n), or (tokens, n + 1) with a constant one where the reader has a bias."""
        rows = token_rows(values[self.hidden], mask) if self.hidden is not None else torch.zeros(0)
        return with_ones(rows) if self.biased else rows

    def entry_rows(self, values: Values, mask: torch.Tensor | None) -> torch.Tensor | None:
        """(tokens, d + 1): what the writers read, and a constant one."""
        return None if self.entry is None else with_ones(token_rows(values[self.entry], mask))

    def coherence(self, values: Values, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Of a rotary embedding's pairs, from a batch's first sequence, see :func:`rotary_coherence.coherence`.

        None where nothing is rotated, or where the tables or what may attend to what cannot be told.
        """
        if len(self.tables) != 2 or not all(node in values for node in self.tables):
            return None
        cosine, sine = (values[node] for node in self.tables)
        if cosine.ndim < 2 or cosine.shape[-2:] != sine.shape[-2:]:
            return None
        length, half = cosine.shape[-2], cosine.shape[-1] // 2
        cosine, sine = (table.reshape(-1, length, 2, half)[0].double() for table in (cosine, sine))
        if not (torch.equal(cosine[:, 0], cosine[:, 1]) and torch.equal(sine[:, 0], sine[:, 1])):
            return None  # numbers that are not turned in pairs
        real = torch.ones(length, dtype=torch.bool, device=cosine.device)
        if mask is not None and mask.shape[-1] == length:
            real = mask[0].bool()
        allowed = self._allowed(values, length)
        if allowed is None or int(real.sum()) < 2:
            return None
        allowed = allowed.to(real.device)[real][:, real]
        return coherence(torch.complex(cosine[:, 0], sine[:, 0])[real], allowed) if allowed.any() else None

    def _allowed(self, values: Values, length: int) -> torch.Tensor | None:
        """(length, length): which position of the first sequence may attend to which."""
        node = self.graph.node(self.region.attention)
        if self.visible is None:
            whole = torch.ones(length, length, dtype=torch.bool)
            return whole.tril() if node.kwargs.get("is_causal") or True in node.args[5:6] else whole
        if self.visible not in values:
            return None
        mask: torch.Tensor = values[self.visible]
        if mask.ndim < 2 or mask.shape[-1] != length or mask.shape[-2] not in (1, length):
            return None
        mask = mask.reshape(-1, *mask.shape[-2:])[0].expand(length, length)
        return mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2

    def reader_weight(self) -> torch.Tensor:
        """(out, n) float64, or (out, n + 1) with the bias as last column."""
        assert self.reader is not None
        weight = self.graph.weight(self.reader).double()
        bias = self.graph.bias(self.reader)
        return weight if bias is None else torch.cat([weight, bias.double()[:, None]], 1)

    def mapped(self, writer: Op, down: torch.Tensor) -> dict[torch.fx.Node, torch.Tensor]:
        """The writer's weight and bias with (n, k) ``down`` folded into them, by parameter node."""
        stored = ((writer.weight, self.graph.weight(writer)), (writer.bias, self.graph.bias(writer)))
        return {
            self.graph.node(value.name): (down.T @ tensor.double()).to(tensor.dtype)
            for value, tensor in stored
            if value is not None and tensor is not None
        }

    def statistics(
        self, read: GramAccumulator, entered: GramAccumulator, near: torch.Tensor | None = None
    ) -> RegionStatistics:
        """Of sums over :meth:`read_rows` and :meth:`entry_rows`, either of which may be empty, and :meth:`coherence`.

        Raises:
            SolverError: activations are infinite or NaN.
        """
        for sums in (read, entered):
            check_finite(sums.gram, self.region)
        if isinstance(read, ExpertGrams):
            assert self.reader is not None
            return expert_statistics(read, self.graph.weight(self.reader).double())
        gram = read.gram / max(read.tokens, 1)
        weight = self.reader_weight() if self.reader is not None else None
        if self.biased and weight is not None:
            gram, weight = gram[:-1, :-1], weight[:, :-1]
        return RegionStatistics(
            tokens=max(read.tokens, entered.tokens),
            gram=gram,
            reader_weight=weight,
            entry_gram=None if self.entry is None else entered.gram / max(entered.tokens, 1),
            coherence=near,
            writer_weights={op.name: self._writer_weight(op.name) for op in self.writers},
        )

    def _writer_weight(self, name: str) -> torch.Tensor:
        op = self.graph.op(name)
        weight, bias = self.graph.weight(op).double(), self.graph.bias(op)
        column = weight.new_zeros(len(weight)) if bias is None else bias.double()
        return torch.cat([weight, column[:, None]], 1)
