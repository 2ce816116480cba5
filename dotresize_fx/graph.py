"""The neutral view: the one form in which analysis and rewriting see a graph, be it torch.fx or ONNX.

A graph is a list of :class:`Op` in topological order over named :class:`Value`. Ops have *kinds*, the few that
width analysis has to tell apart; each graph form maps its own op names to these kinds once, in its adapter
(:mod:`dotresize_fx.fx_form.graph`, :mod:`dotresize_fx.onnx_form.graph`). Passes read and edit graphs only through
this class.

Weights are seen in one orientation, whatever the form stores: a linear's weight is (out, in), an embedding's
table (rows, width), a norm's gain (width,).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch

from dotresize_fx.packing import Packing


class Kind(StrEnum):
    """What an op does to the last dimension of its inputs."""

    LINEAR = "linear"  # x @ weight.T + bias
    EXPERTS = "experts"  # each row of x @ the transposed weight of the expert that it was routed to
    EMBEDDING = "embedding"  # rows of a table
    RMS_NORM = "rms_norm"
    LAYER_NORM = "layer_norm"
    ADD = "add"  # x + y or x - y, broadcast
    MUL = "mul"  # x * y, broadcast
    SCALE = "scale"  # x times a number
    POINTWISE = "pointwise"  # any other function, element by element, of one tensor or of several of one width
    KEEP = "keep"  # passes the last dimension on untouched: cast, dropout, reshape, choice or sum of others
    MEAN = "mean"  # over the last dimension
    ADDMM = "addmm"  # x @ weight, on a matrix x also bias + x @ weight: a linear before RecogniseLinears
    RESHAPE = "reshape"  # splits or joins dimensions
    ATTENTION = "attention"
    CHANNELWISE = "channelwise"  # each channel's own function of all places, with its own parameters: depthwise
    OTHER = "other"


@dataclass(frozen=True)
class Value:
    """A tensor of the graph, identified by its name. ``shape`` has the symbol's name for dynamic dimensions."""

    name: str
    shape: tuple[int | str, ...] = field(compare=False)
    is_parameter: bool = field(compare=False, default=False)

    @property
    def width(self) -> int | None:
        """Size of the last dimension; None when dynamic or absent."""
        last = self.shape[-1] if self.shape else None
        return last if isinstance(last, int) else None


@dataclass(frozen=True)
class Op:
    """One operation. ``inputs`` are activations; ``weight`` and ``bias`` are the parameters it owns by its kind.

    Ops that move axes say so in ``attributes``, whatever their kind: ``form`` is ``permute`` (``order``: the input's
    axis for each of the output's), ``view`` or ``expand`` (``sizes``: the sizes it states, None for computed ones),
    ``unsqueeze``, ``concat``, ``slice`` (``start``, ``stop``; None for the end) or ``split`` (``sizes``) along
    ``axis``, ``unbind`` (a split into ones, the ``axis`` gone), ``part`` (``index``, of what a split or unbind gives),
    ``choice`` (``index`` on an ``axis`` that goes), ``where``,
    ``fill`` (``number``), ``size`` (one axis' size), ``strided`` (from ``start`` each ``step``-th along ``axis``) or
    ``shaped like`` (reads nothing but shape and dtype). Axes count from 0. An EXPERTS op's weight is (experts, out,
    in); its inputs are the rows, ordered by expert, and where each expert's rows end, ``rows_per_token`` how many a
    token has. Where each expert sees all rows these alone are its input, (experts, rows, width). A KEEP op that
    ``joins`` passes on all of its inputs, any other the first. An ATTENTION op has ``scale`` (None: one over the root
    of the head size) and ``grouped`` (it shares KV heads among query heads by itself); its inputs begin with query, key
    and value, the key with its last two axes exchanged where it is ``turned``. One that ``mixes`` is spelled op by op:
    the product of weights and values, its inputs. One that is ``merged`` takes and gives (batch, length, heads times
    size), with the numbers of query and of KV heads in ``sizes``, one number where they are as many; ``cache`` has the
    outputs by which it hands keys and values on itself, and ``one_size`` says that all its heads have to be of one
    size. An op that is ``rotary`` rotates halves by cosines and sines of half the size. A CHANNELWISE op
    has ``channels``, their axis in its input and output; its other inputs are parameters (channels, ...). A RESHAPE
    that ``flattens`` joins or parts axes and states no size that stays. An OTHER op that is ``over_width`` takes a
    deviation over the last dimension, whose order it does not know.
    One that is ``quantised`` has the name and the shape, (out, in), of a weight that nobody can read.
    """

    name: str
    kind: Kind
    inputs: tuple[Value, ...] = field(compare=False)
    output: Value = field(compare=False)
    weight: Value | None = field(compare=False, default=None)
    bias: Value | None = field(compare=False, default=None)
    attributes: Mapping[str, Any] = field(compare=False, default_factory=dict)
    spelling: str = field(compare=False, default="")  # the form's own name of the op, for messages

    @property
    def is_linear(self) -> bool:
        """Whether it multiplies by a weight of its own: one, or one an expert."""
        return self.kind in (Kind.LINEAR, Kind.EXPERTS)

    @property
    def sums_width(self) -> bool:
        """Whether it makes one number of a width's, whatever their order: a mean or a deviation."""
        return self.kind is Kind.MEAN or bool(self.attributes.get("over_width"))

    @property
    def scales_rows(self) -> bool:
        """Whether it multiplies each row by a number of its own, and so is linear in the width."""
        return (
            self.kind is Kind.MUL
            and len(self.inputs) == 2
            and sum(value.width != 1 and value.shape != () for value in self.inputs) == 1
        )

    @property
    def function(self) -> str:
        """Name of a pointwise function (``silu``, ``relu``, ``pow``); empty for other kinds."""
        return str(self.attributes.get("function", ""))


class Graph(ABC):
    """Reading is cached; every edit drops the cache."""

    # -- reading -----------------------------------------------------------------------------------

    @cached_property
    def ops(self) -> list[Op]:
        """All ops in topological order."""
        return self._read_ops()

    @cached_property
    def outputs(self) -> frozenset[Value]:
        """Values the graph returns."""
        return self._read_outputs()

    @cached_property
    def packings(self) -> dict[str, Packing]:
        """By a parameter's name in the model, as which others its rows are seen; passes that split linears note it."""
        return {}

    @cached_property
    def caches(self) -> dict[str, str]:
        """Outputs that carry on an input, keys or values of a cache, and that input, by name; its size may be cut."""
        return {}

    @cached_property
    def _producers(self) -> dict[Value, Op]:
        return {op.output: op for op in self.ops}

    @cached_property
    def _users(self) -> dict[Value, list[Op]]:
        users: dict[Value, list[Op]] = defaultdict(list)
        for op in self.ops:
            for value in dict.fromkeys((*op.inputs, op.weight, op.bias)):
                if value is not None:
                    users[value].append(op)
        return users

    @cached_property
    def positions(self) -> dict[str, int]:
        """Op name -> index in :attr:`ops`."""
        return {op.name: i for i, op in enumerate(self.ops)}

    def producer(self, value: Value) -> Op | None:
        """The op that computes ``value``; None for inputs and parameters."""
        return self._producers.get(value)

    def users(self, value: Value) -> list[Op]:
        """Ops that read ``value``, as an activation or as a parameter, in topological order."""
        return self._users.get(value, [])

    def op(self, name: str) -> Op:
        """The op of this name, as it is now (an Op held across an edit may be stale)."""
        return self.ops[self.positions[name]]

    def changed(self) -> None:
        """Forget what was read; called by every edit."""
        for name in ("ops", "outputs", "_producers", "_users", "positions"):
            self.__dict__.pop(name, None)

    def weight(self, op: Op) -> torch.Tensor:
        """The op's weight in the view's orientation: (out, in), (rows, width) or (width,)."""
        if op.weight is None:
            raise ValueError(f"{op.name} ({op.kind}) has no weight")
        return self._read_weight(op)

    def bias(self, op: Op) -> torch.Tensor | None:
        """The op's bias, (out,) or (width,); None when it has none."""
        return None if op.bias is None else self.parameter(op.bias)

    # -- what each form supplies -------------------------------------------------------------------

    @abstractmethod
    def _read_ops(self) -> list[Op]: ...

    @abstractmethod
    def _read_outputs(self) -> frozenset[Value]: ...

    @abstractmethod
    def _read_weight(self, op: Op) -> torch.Tensor: ...

    @abstractmethod
    def parameter(self, value: Value) -> torch.Tensor:
        """The tensor behind a parameter value, as it is stored."""

    def is_buffer(self, value: Value) -> bool:
        """Whether a parameter value is a table the model computed for itself, not something it learned."""
        return False

    def beside(self, op: Op) -> tuple[Value, ...]:
        """What an op puts out beside its output, where something reads that and the view shows no op for it."""
        return ()

    def details(self, op: Op) -> tuple[object, ...]:
        """What the view does not show of an op and what decides what it computes, the same for ops that do the same."""
        return ()

    @abstractmethod
    def parameter_name(self, value: Value) -> str:
        """The name the model gives this parameter, such as ``model.layers.0.mlp.up_proj.weight``."""

    @abstractmethod
    def set_weight(self, ops: Op | Sequence[Op], tensor: torch.Tensor) -> None:
        """Give the op another weight, in the view's orientation; its shape may differ.

        Several ops given together share the new tensor afterwards. A weight that ops not named here use too is
        forked, so that they keep theirs.
        """

    @abstractmethod
    def set_bias(self, op: Op, tensor: torch.Tensor | None) -> None:
        """Give the op another bias, or none; forked like a weight."""

    @abstractmethod
    def set_parameter(self, value: Value, tensor: torch.Tensor) -> None:
        """Give a parameter that no op owns by its kind alone another tensor for all that read it, as it is stored."""

    @abstractmethod
    def resize_norm(self, op: Op, width: int, epsilon: float) -> None:
        """Let a norm without gain and bias act on another width, with another epsilon."""

    @abstractmethod
    def resize_reshape(self, op: Op, width: int) -> None:
        """Let a reshape that keeps the last dimension (attribute ``reshape``) keep another width."""

    @abstractmethod
    def resize_axes(self, op: Op, sizes: Mapping[int, int]) -> None:
        """Let a view or expand state other sizes for these axes of its output; inferred and computed ones stay."""

    @abstractmethod
    def resize_slice(self, op: Op, start: int, stop: int | None) -> None:
        """Let a slice take another range; ``stop`` None is the end."""

    def resize_channels(self, op: Op, width: int) -> None:
        """Let a CHANNELWISE op have another number of channels; its parameters are given theirs apart."""
        raise NotImplementedError

    def input_sizes(self, name: str) -> tuple[int | str, ...]:
        """Sizes of an input of the graph."""
        raise NotImplementedError

    def resize_input(self, name: str, sizes: Mapping[int, int]) -> None:
        """Let an input of the graph have other sizes on these axes."""
        raise NotImplementedError

    def remove_caches(self, outputs: Collection[str]) -> None:
        """Take these outputs of :attr:`caches` and their inputs away; the layers that are left are numbered anew.

        Nothing but an output may need their keys and values any more, and a cache has to be left.
        """
        raise NotImplementedError

    def remove_ops(self, names: Sequence[str]) -> None:
        """Remove these ops, in topological order, also ones that write into tensors, as far as nothing needs them."""
        raise NotImplementedError

    @abstractmethod
    def insert_gather(self, source: Value, indices: torch.Tensor, *, users: Iterable[Op], name: str = "gathered") -> Op:
        """Let the given users read ``source[..., indices]`` instead of ``source``; ``indices`` is (k,), integers."""

    @abstractmethod
    def set_attention_scale(self, op: Op, scale: float) -> None:
        """State what an ATTENTION op multiplies its scores by."""

    @abstractmethod
    def redirect(self, op: Op, value: Value) -> None:
        """Let the users of ``op``'s output, and the graph's outputs, read ``value`` instead; ``op`` becomes dead."""

    @abstractmethod
    def drop_affine(self, op: Op) -> None:
        """Take a norm's gain and bias away."""

    @abstractmethod
    def insert_linear(
        self,
        source: Value,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        users: Iterable[Op] | None = None,
        name: str = "inserted",
        like: Op | None = None,
    ) -> Op:
        """Put ``linear(source, weight, bias)`` behind ``source``; the given users (default: all) read it instead.

        With a weight (experts, out, in) it is routed as the EXPERTS op ``like``, which reads ``source`` or writes it.
        """

    @abstractmethod
    def replace_with_rms_norm(self, last: Op, source: Value, gain: Value | None, epsilon: float) -> None:
        """Compute ``last.output`` as one RMSNorm of ``source`` instead; what only ``last`` needed becomes dead."""

    @abstractmethod
    def replace_with_linear(self, last: Op, source: Value, like: Op) -> None:
        """Compute ``last.output`` as a linear of ``source`` with the weight and bias of the ADDMM op ``like``."""

    def replace_with_layer_norm(self, last: Op, source: Value, gain: Value | None, epsilon: float) -> bool:
        """Compute ``last.output`` as one layer norm of ``source``, as :meth:`replace_with_rms_norm` does.

        Returns whether it did: not every form can.
        """
        return False

    states_views = False  # whether the form can repeat a view of a value, see :meth:`insert_like`

    def insert_like(self, op: Op, source: Value, last: tuple[int, ...] = (), replaced: int = 0) -> Value:
        """Repeat ``op``, a view, permutation or unsqueeze, on ``source``; a view with other ``last`` axes."""
        raise NotImplementedError

    def reread(self, op: Op, value: Value) -> None:
        """Let ``op`` read ``value`` in place of its first input."""
        raise NotImplementedError

    def drop_in_place(self) -> list[str]:
        """Let ops that write into their input compute a new value instead, where nothing else sees what they write to.

        Returns what was changed; a form that has no such ops returns nothing.
        """
        return []

    def recognise_patches(self) -> list[str]:
        """Let a linear of each patch stand for a convolution that cuts an image into patches, its channels put last.

        Returns what was changed; a form that cannot do it returns none.
        """
        return []

    def recognise_pointwise(self) -> list[str]:
        """Let a linear of each pixel's channels, put last and back, stand for a convolution of single pixels.

        Returns what was changed; a form that cannot do it returns none.
        """
        return []

    def join_expert_lists(self) -> list[str]:
        """Let one EXPERTS op stand for linears of parts of the rows, each with its part of one weight, joined again.

        Returns what was changed; a form that cannot do it returns none.
        """
        return []

    def normalise_views(self) -> list[str]:
        """Let one permutation stand for a view, a permutation and a view that exchange the last two of four axes, and
        two views for one that joins the first two and the last two.

        Returns what was changed; a form that cannot do it returns none.
        """
        return []

    def distribute_slices(self) -> list[str]:
        """Where slices of the last axis, or a split, alone read a sum with a linear's result, sum slices instead.

        Returns what was changed; a form that cannot do it returns none.
        """
        return []

    def fold_constants(self, largest: int) -> list[str]:
        """Store what ops compute from parameters alone as parameters: vectors of at most so many numbers.

        What reads parameters that were folded is folded in its turn. Returns what was; a form that stores nothing of
        the kind returns none.
        """
        return []

    @abstractmethod
    def make_rms_norm(self, op: Op) -> None:
        """Turn a layer norm without gain and bias into an RMSNorm of the same epsilon."""

    @abstractmethod
    def bypass(self, op: Op) -> None:
        """Let the users of ``op`` read its first input instead, and remove it."""

    @abstractmethod
    def remove_dead(self) -> int:
        """Remove ops and parameters that nothing needs; returns how many ops went."""

    @abstractmethod
    def copy(self) -> Graph:
        """An independent graph over the same tensors: edits to one do not show in the other."""
