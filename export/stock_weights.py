"""A graph's weights under the names, in the shapes and with the packing of the model that it was captured from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch

from dotresize_fx.errors import CheckpointError
from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.regions import Region

Turn = Callable[[torch.Tensor], torch.Tensor]
# How a model may store what the view shows: as it is; turned round (GPT-2); a gain as what it exceeds one by (Gemma);
# as a convolution of single places, along one axis or two.
_TURNS: tuple[Turn, ...] = (
    lambda t: t,
    lambda t: t.mT if t.ndim > 1 else t,
    lambda t: t - 1 if t.ndim == 1 else t,
    lambda t: t[..., None] if t.ndim == 2 else t,
    lambda t: t[..., None, None] if t.ndim == 2 else t,
)
ROUNDING = 1e-6


class _Place(NamedTuple):
    """Which of an op's parameters; ``kind`` and ``width`` are those of the op in the dense graph."""

    op: str
    is_bias: bool
    kind: Kind
    width: int


class StockWeights:
    """What the canonical rewrites did to a model's parameters, undone.

    It is found on the dense graph, whose weights must come out as the model's own: that is the proof of each name. A
    graph made of the dense one keeps its ops' names, so the same ways lead back from its weights.

    Raises:
        CheckpointError: a parameter of the model went into others for good.
    """

    def __init__(self, model: torch.nn.Module, dense: Graph) -> None:
        self._model, self._packings = model, dense.packings
        self._stored: dict[str, torch.Tensor] = dict(model.state_dict())
        self._places: dict[str, list[_Place]] = defaultdict(list)
        for op in dense.ops:
            for value, is_bias in ((op.weight, False), (op.bias, True)):
                if value is not None and value.is_parameter:
                    place = _Place(op.name, is_bias, op.kind, value.width or 0)
                    self._places[dense.parameter_name(value)].append(place)
        self._biased = {place.op for places in self._places.values() for place in places if place.is_bias}
        parts = {part for packing in self._packings.values() for part in packing.parts}
        self._aliases = _aliases(self._stored)
        # Under which names the dense graph holds what the model calls so.
        self._names: dict[str, list[str]] = {}
        for name in (*self._packings, *self._places):
            if name not in parts:
                for key in self._aliases.get(self._owner(name), ()):
                    self._names.setdefault(key, []).append(name)
        self._turns = {key: self._turn(key, dense) for key in self._names}

    def of(self, graph: Graph) -> dict[str, torch.Tensor]:
        """The state dict that ``graph``, made of the dense one, asks for.

        Raises:
            CheckpointError: a weight or bias of it has no place in the model.
        """
        added = [op for op in graph.ops if op.is_linear and op.bias is not None and op.name not in self._biased]
        for op in added:
            bias = graph.bias(op)
            if bias is not None and bias.any():
                raise CheckpointError(f"{graph.parameter_name(_weight(op))}: it has a bias now, the stock module none")
        state = {}
        for key, stored in self._stored.items():
            if key in self._turns:
                state[key] = self._turns[key](self._read(graph, key)).to(stored.dtype).contiguous()
            else:
                state[key] = stored
        return state

    def keys(self, region: Region) -> set[str]:
        """The names of the model's parameters that have the region's dimension, of the dense graph."""
        ends = {*region.writers, *region.norms}
        return {
            key for key in self._turns if any(self._has(place, ends, region.readers) for place in self._behind(key))
        }

    def keys_of(self, ops: Collection[str]) -> set[str]:
        """The names of the model's parameters that these ops of the dense graph have."""
        return {key for key in self._turns if any(place.op in ops for place in self._behind(key))}

    def leave_out(self, keys: Collection[str]) -> None:
        """Parameters of layers that are gone: nothing asks for them any more."""
        for key in keys:
            self._stored.pop(key, None)
            self._turns.pop(key, None)

    @staticmethod
    def _has(place: _Place, ends: Collection[str], readers: Collection[str]) -> bool:
        return place.op in ends or (place.op in readers and not place.is_bias)

    def _behind(self, key: str) -> list[_Place]:
        return [place for name in self._names[key] for place in self._of(name)]

    def tied(self, graph: Graph) -> bool:
        """Whether parameters that the model ties are still one in ``graph``."""
        return all(
            self._read(graph, one) is self._read(graph, key)
            or torch.equal(self._read(graph, one), self._read(graph, key))
            for key in self._turns
            for one in self._aliases[key]
        )

    def _owner(self, name: str) -> str:
        """The model's own parameter that the program's was made of: a fork or a folded sum has its name in front."""
        if name in self._stored:
            return name
        return max((key for key in self._stored if name.startswith(f"{key}_")), key=len, default=name)

    def _of(self, name: str) -> list[_Place]:
        packing = self._packings.get(name)
        if packing is None:
            return self._places.get(name, [])
        return [place for part in packing.parts for place in self._of(part)]

    def _read(self, graph: Graph, key: str) -> torch.Tensor:
        """What stands for ``key``; of a table that a head shares the table or the head's weight, as the module is."""
        module = self._model.get_submodule(key.rpartition(".")[0])
        table = isinstance(module, torch.nn.Embedding) if len(self._aliases[key]) > 1 else None
        found = [value for name in self._names[key] for value in self._all_read(graph, name, table)]
        if not found:
            raise CheckpointError(f"{key}: what it stands in is gone from the slim program")
        if any(other is not found[0] and not torch.equal(other, found[0]) for other in found[1:]):
            raise CheckpointError(f"{key}: several layers share it, and the slim program has a weight for each")
        return found[0]

    def _all_read(self, graph: Graph, name: str, table: bool | None) -> list[torch.Tensor]:
        packing = self._packings.get(name)
        if packing is not None:
            parts = [self._all_read(graph, part, table) for part in packing.parts]
            if not all(parts):
                raise CheckpointError(f"{name}: a part of it is gone from the slim program")
            try:
                return [packing.join([part[0] for part in parts], -2 if parts[0][0].ndim > 1 else -1)]
            except ValueError as error:
                raise CheckpointError(f"{name}: cannot be put together again: {error}") from error
        places = self._places.get(name, [])
        if table is not None:
            places = [place for place in places if (place.kind is Kind.EMBEDDING) is table]
        return list({id(held): held for held in (_held(graph, place) for place in places)}.values())

    def _turn(self, key: str, dense: Graph) -> Turn:
        stored, seen = self._stored[key], self._read(dense, key)

        def patches(rows: torch.Tensor) -> torch.Tensor:
            """One in a row each."""
            return rows.reshape(-1, *stored.shape[1:])

        for turn in (*_TURNS, patches):
            if seen.numel() != stored.numel():
                break
            turned = turn(seen)
            if turned.shape == stored.shape and (
                torch.equal(turned, stored) or torch.allclose(turned, stored, rtol=0, atol=ROUNDING)
            ):
                return turn
        raise CheckpointError(f"{key}: it went into another weight, which the checkpoint has no way back from")


def _held(graph: Graph, place: _Place) -> torch.Tensor:
    """What the op has there now: a gain that was folded into readers is ones, a bias zeros."""
    try:
        op = graph.op(place.op)
    except KeyError:
        raise CheckpointError(f"{place.op}, a {place.kind} of the model, is gone from the slim program") from None
    value = op.bias if place.is_bias else op.weight
    if value is None:
        width = op.output.width
        if place.kind not in (Kind.RMS_NORM, Kind.LAYER_NORM) or width is None:
            raise CheckpointError(f"{place.op}: its parameter is gone from the slim program")
        return torch.zeros(width) if place.is_bias else torch.ones(width)
    return graph.parameter(value) if place.is_bias else graph.weight(op)


def _weight(op: Op) -> Value:
    assert op.weight is not None
    return op.weight


def _aliases(stored: dict[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    """By name, all names that the same parameter goes by."""
    groups: dict[tuple[int, torch.Size], list[str]] = defaultdict(list)
    for key, tensor in stored.items():
        groups[tensor.data_ptr(), tensor.shape].append(key)
    return {key: tuple(keys) for keys in groups.values() for key in keys}
