"""The parameters of a program that is run: in memory, or read from files when needed, and ahead of that on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.export.graph_signature import InputKind

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.fx_form.half_products import only_in_products
from dotresize_fx.offload.held_weights import Wanted
from dotresize_fx.offload.lazy_tensor import PIECE, LazyTensor


class StoredParameters:
    """Those of ``graph``, by their placeholders; ``nodes`` are its calls in their order, ``inputs`` what is given,
    ``learned`` the parameters that are no buffers.
    """

    def __init__(self, graph: FxGraph) -> None:
        self.graph = graph
        self.program = graph.program
        specs = self.program.graph_signature.input_specs
        placeholders = [node for node in graph.nodes.nodes if node.op == "placeholder"]
        self.inputs = [n for n, s in zip(placeholders, specs, strict=True) if s.kind is InputKind.USER_INPUT]
        self.parameters = [n for n, s in zip(placeholders, specs, strict=True) if s.kind is not InputKind.USER_INPUT]
        self.learned = [n for n, s in zip(placeholders, specs, strict=True) if s.kind is InputKind.PARAMETER]
        self.nodes = [node for node in graph.nodes.nodes if node.op == "call_function"]
        self._keys = {n: str(s.target) for n, s in zip(placeholders, specs, strict=True)}
        self._tables = {node.args[0] for node in self.nodes if node.target is torch.ops.aten.embedding.default}
        read = set(self.parameters)
        order = dict.fromkeys(used for node in self.nodes for used in node.all_input_nodes if used in read)
        self._order, self._place = list(order), {node: i for i, node in enumerate(order)}
        self._told = -1  # up to which parameter what follows was told to be read ahead
        self._rounded = only_in_products(self.parameters) if graph.half_products else set()

    def stored(self, node: torch.fx.Node) -> torch.Tensor:
        """The tensor behind a parameter placeholder, read or not."""
        return self.graph.stored(self._keys[node])

    def parameter(self, node: torch.fx.Node, *, ahead: bool = False) -> torch.Tensor:
        """The tensor behind a parameter placeholder, as it is now; one in a file is read, if not parts of it do. Where
        bfloat16 is all that is made of it, it is that. ``ahead``: what comes behind it is about to be read too.
        """
        wanted = self._in_file(node)
        if wanted is None:
            return self.stored(node)
        stored, dtype = wanted
        weights = self.graph.spool.weights if self.graph.spool is not None else None
        if weights is None or not weights.has_room(stored.numel() * dtype.itemsize):
            return stored if stored.nbytes > PIECE else stored.read()
        held = weights.holds(stored, dtype)
        found = weights.read(stored, dtype)
        if ahead and not (held and self._place[node] <= self._told):  # once for all batches
            self._told = self._place[node]
            weights.read_ahead(self._following(node, weights.limit // 2))
        return found

    def _following(self, node: torch.fx.Node, size: int) -> Iterator[Wanted]:
        """What of files is read behind a parameter, so many bytes of it."""
        for lazy, dtype in self._in_files(self._order[self._place[node] + 1 :]):
            size -= lazy.numel() * dtype.itemsize
            if size < 0:
                return
            yield lazy, dtype

    def bytes_of_files(self, nodes: Iterable[torch.fx.Node]) -> int:
        """Of what of these parameters stays in files, as it is used."""
        return sum(lazy.numel() * dtype.itemsize for lazy, dtype in self._in_files(nodes))

    def _in_files(self, nodes: Iterable[torch.fx.Node]) -> Iterator[Wanted]:
        """What of parameters stays in files, and what it is used as."""
        return (wanted for node in nodes if (wanted := self._in_file(node)) is not None)

    def _in_file(self, node: torch.fx.Node) -> Wanted | None:
        stored = self.stored(node)
        if not isinstance(stored, LazyTensor) or node in self._tables:
            return None
        return stored, torch.bfloat16 if node in self._rounded else stored.dtype
