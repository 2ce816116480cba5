"""What a region's linears see while a program runs: the nodes to watch, and the statistics that their values give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dotresize_fx.expert_statistics import ExpertGrams
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import GramAccumulator, token_rows, with_ones
from dotresize_fx.graph import Op
from dotresize_fx.region_ops import RegionOps
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.rotary_coherence import coherence, turns_of

Values = Mapping[torch.fx.Node, Any]


class RegionInputs(RegionOps):
    """Watches one region of ``graph``: what its reader reads and puts out, and what its writers read.

    Where there is no reader ``entry``, the one value that all writers read, is watched instead. Node names stay valid
    while other regions' maps are folded.
    """

    graph: FxGraph

    def __init__(self, graph: FxGraph, region: Region) -> None:
        super().__init__(graph, region)
        self.entry = self.hidden = self.output = None
        if self.reader is None:
            self.entry = graph.node(self.writers[0].inputs[0].name)
        if self.reader is not None:
            self.hidden, self.output = graph.node(self.reader.inputs[0].name), graph.node(self.reader.name)
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
        turns = turns_of(cosine, sine, cosine.shape[-1] // 2)
        if turns is None:
            return None
        length = len(turns)
        real = torch.ones(length, dtype=torch.bool, device=turns.device)
        if mask is not None and mask.shape[-1] == length:
            real = mask[0].bool()
        allowed = self._allowed(values, length)
        if allowed is None or int(real.sum()) < 2:
            return None
        allowed = allowed.to(real.device)[real][:, real]
        return coherence(turns[real], allowed) if allowed.any() else None

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

    def mapped(self, writer: Op, down: torch.Tensor) -> dict[torch.fx.Node, torch.Tensor]:
        """The writer's weight and bias with (n, k) ``down`` folded into them, by parameter node."""
        stored = ((writer.weight, self.graph.weight(writer)), (writer.bias, self.graph.bias(writer)))
        return {
            self.graph.node(value.name): (down.T @ tensor.double()).to(tensor.dtype)
            for value, tensor in stored
            if value is not None and tensor is not None
        }
