"""Float32 copies of a program's parameters that training moves, and their way back into the program."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.export.graph_signature import InputKind

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.fx_form.trunk import Trunk


class MasterWeights:
    """``masters`` are float32 copies of what ``trunk`` reads: one a tensor, so that keys that share one still do.

    Programs share tensors with the ones they were copied from: the originals are never written to.
    """

    def __init__(self, graph: FxGraph, trunk: Trunk) -> None:
        self._graph, self._trunk = graph, trunk
        groups: dict[tuple[object, ...], list[str]] = {}
        for spec in graph.program.graph_signature.input_specs:
            key = str(spec.target)
            if spec.kind is InputKind.PARAMETER and (stored := graph.stored(key)).is_floating_point():
                groups.setdefault((stored.data_ptr(), stored.shape, stored.stride()), []).append(key)
        self._keys = [keys for keys in groups.values() if not trunk.parameters.isdisjoint(keys)]
        self.masters = [torch.nn.Parameter(graph.stored(keys[0]).detach().float().clone()) for keys in self._keys]
        self._fixed = {key: graph.stored(key).detach() for key in trunk.keys}

    def named(self) -> dict[str, torch.Tensor]:
        """The copies by the first key of each."""
        return {keys[0]: master for keys, master in zip(self._keys, self.masters, strict=True)}

    def values(self) -> dict[str, torch.Tensor]:
        """What the trunk and its head compute with: the copies in the program's dtypes, and its buffers.

        Those that only bfloat16 products read are in that, as autocast would have them each time.
        """
        values = dict(self._fixed)
        for keys, master in zip(self._keys, self.masters, strict=True):
            cast = master.to(self._graph.stored(keys[0]).dtype)
            products = self._trunk.products.intersection(keys)
            values.update({key: cast for key in keys if key in values and key not in products})
            if products:
                values.update(dict.fromkeys(products, cast.to(torch.bfloat16)))
        return values

    def store(self, tensors: Sequence[torch.Tensor] | None) -> None:
        """Put ``tensors``, one a master, into the program's state dict; None leaves it as it is."""
        for keys, tensor in zip(self._keys, tensors or (), strict=tensors is not None):
            old = self._graph.stored(keys[0])
            shared = torch.nn.Parameter(tensor.to(old.device, old.dtype), requires_grad=False)
            self._graph.program.state_dict.update(dict.fromkeys(keys, shared))
