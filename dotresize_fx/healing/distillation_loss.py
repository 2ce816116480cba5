"""How far a slim program is from the dense one, with gradients: over a large vocabulary in chunks of positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from dotresize_fx.errors import UsageError
from dotresize_fx.fidelity import Inputs
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.fx_form.trunk import Trunk

# Positions whose float32 logits are held at once: 200 MB a tensor for a vocabulary of 49k.
POSITIONS_AT_ONCE = 1024
Weights = tuple[torch.Tensor | None, torch.Tensor | None]


class Batch(NamedTuple):
    """Inputs of one forward pass; ``padding`` is bool (batch * length,), True on padding, or None where none is."""

    inputs: Inputs
    padding: torch.Tensor | None

    def tokens(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, length, width) -> (tokens, width), zero on padding; (batch, width) as it is.

        Picking out the real positions instead would make shapes depend on data, which a CUDA graph cannot.
        """
        if states.ndim == 2:
            return states
        rows = states.flatten(0, 1)
        return rows if self.padding is None else rows.masked_fill(self.padding[:, None], 0)


class _Divergence(torch.autograd.Function):
    """The gradients are made with the loss, chunk by chunk: d KL / d logits is softmax(slim) - softmax(dense).

    All is bound by traffic of (chunk, vocabulary) tensors: hence what is reused, rounded on the way out, or left out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        dense_states: torch.Tensor,
        dense_weight: torch.Tensor | None,
        dense_bias: torch.Tensor | None,
        padding: torch.Tensor | None,
        measured: bool,
    ) -> torch.Tensor:
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        slim, dense = _cast((weight, bias), dtype), _cast((dense_weight, dense_bias), dtype)
        loss = torch.zeros((), device=states.device)
        gradients = [
            torch.zeros_like(part, dtype=torch.float32) if part is not None and wanted else None
            for part, wanted in zip((states, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        to_states, to_weight, to_bias = gradients
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(states), POSITIONS_AT_ONCE):
                chunk = slice(start, start + POSITIONS_AT_ONCE)
                rows = states[chunk].to(dtype)
                slim_logits, dense_logits = _logits(rows, slim), _logits(dense_states[chunk].to(dtype), dense)
                if measured:
                    q = slim_logits.log_softmax(-1, dtype=torch.float32)
                    log_p = dense_logits.log_softmax(-1, dtype=torch.float32)
                    p = log_p.exp()
                    log_p -= q
                    if padding is not None:
                        log_p.masked_fill_(padding[chunk, None], 0)
                    loss += torch.dot(p.flatten(), log_p.flatten())
                    del log_p
                    if not any(gradient is not None for gradient in gradients):
                        continue
                    q.exp_()
                else:
                    q = slim_logits.softmax(-1, dtype=torch.float32)
                    p = dense_logits.softmax(-1, dtype=torch.float32)
                del dense_logits
                # Into the logits, whose dtype the products want.
                change = torch.sub(q, p, out=slim_logits if slim[0] is not None else q)
                if padding is not None:
                    change.masked_fill_(padding[chunk, None], 0)
                if to_bias is not None:
                    to_bias += change.sum(0, dtype=torch.float32)
                if to_weight is not None:
                    to_weight += change.t() @ rows
                if to_states is not None:
                    to_states[chunk] = change if slim[0] is None else change @ slim[0]
        ctx.gradients = gradients
        ctx.dtypes = [part.dtype if part is not None else None for part in (states, weight, bias)]
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> Any:
        # Scaled in place: they are needed once.
        gradients, ctx.gradients = ctx.gradients, None
        found = zip(gradients, ctx.dtypes, strict=True)
        return *(None if part is None else part.mul_(factor).to(dtype) for part, dtype in found), *[None] * 5


def _detached(weights: Weights) -> Weights:
    weight, bias = (None if part is None else part.detach() for part in weights)
    return weight, bias


def _cast(weights: Weights, dtype: torch.dtype) -> Weights:
    weight, bias = (None if part is None else part.to(dtype) for part in _detached(weights))
    return weight, bias


def _logits(rows: torch.Tensor, head: Weights) -> torch.Tensor:
    weight, bias = head
    return rows if weight is None else torch.nn.functional.linear(rows, weight, bias)


def divergence(
    states: torch.Tensor,
    head: Weights,
    dense_states: torch.Tensor,
    dense_head: Weights = (None, None),
    *,
    padding: torch.Tensor | None = None,
    measured: bool = True,
) -> torch.Tensor:
    """Sum over rows of KL(dense || slim) in nats, a float32 scalar; gradients go to ``states`` and ``head``.

    Args:
        states: (tokens, width) what the head reads; the logits themselves where the head is (None, None).
        head: weight (vocabulary, width) and bias (vocabulary,) or None.
        dense_states, dense_head: the same of the dense model, perhaps of another width; no gradient.
        padding: bool (tokens,), True for rows that do not count.
        measured: if False the sum is left out and 0 returned, with the gradients all the same: they need half the
            memory traffic, and no more.

    Products are computed in autocast's dtype where that is on, in the states' own elsewhere; softmax in float32.
    """
    if not torch.is_grad_enabled():
        # The function itself only sees that they ask for gradients.
        states, head = states.detach(), _detached(head)
    loss: torch.Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
        states, *head, dense_states, *dense_head, padding, measured
    )
    return loss


def relative_error(states: torch.Tensor, dense_states: torch.Tensor) -> torch.Tensor:
    """Sum over rows of |slim - dense|² / |dense|², a float32 scalar; both are (tokens, width).

    Raises:
        UsageError: the widths differ.
    """
    if states.shape != dense_states.shape:
        raise UsageError(
            f"states of {states.shape[-1]} and {dense_states.shape[-1]} dimensions cannot be compared: "
            "a stream whose width was cut is no target"
        )
    found, expected = states.float(), dense_states.float()
    return ((found - expected).square().sum(-1) / expected.square().sum(-1).clamp_min(1e-12)).sum()


class Distillation:
    """The loss of one batch: KL of a decoder's next token, relative error of an encoder's first output; and streams'.

    Nothing in it waits for the device, and no shape depends on data: it can be recorded as a CUDA graph.

    ``precision`` is the autocast dtype, or None. Both graphs must lie on one device; neither is changed.

    Raises:
        UsageError: a stream is missing in one of the graphs.
    """

    def __init__(
        self, dense: FxGraph, slim: FxGraph, task: str, streams: tuple[str, ...], precision: torch.dtype | None
    ) -> None:
        cut, half = task == "decoder", precision is not None
        self.dense, self.slim = (Trunk(graph, streams, cut_head=cut, bfloat16=half) for graph in (dense, slim))
        self.task, self.precision = task, precision
        self.dense_values = {key: dense.stored(key).detach() for key in self.dense.keys}
        self.device = next(iter(self.dense_values.values())).device
        if precision is not None:
            self.dense_values |= {key: self.dense_values[key].to(precision) for key in self.dense.products}
        self._dense_head = self._head(self.dense, self.dense_values)
        if precision is not None:
            self._dense_head = _cast(self._dense_head, precision)

    def __call__(
        self, values: Mapping[str, torch.Tensor], batch: Batch, *, measured: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum over outputs, sum over tokens of the streams' mean relative error), float32 scalars.

        ``values`` are the slim program's parameters and buffers by key. Without ``measured`` the first may be 0, with
        its gradients all the same.
        """
        # No cache: what is read twice is rounded before, and a cache must not outlive a recording.
        kind, dtype = self.device.type, self.precision
        with torch.autocast(kind, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            with torch.no_grad():
                expected, dense_streams = self.dense(self.dense_values, batch.inputs)
            found, streams = self.slim(values, batch.inputs)
            rows, dense_rows = batch.tokens(found), batch.tokens(expected)
            if self.task == "decoder":
                head, padding = self._head(self.slim, values), batch.padding if found.ndim > 2 else None
                loss = divergence(rows, head, dense_rows, self._dense_head, padding=padding, measured=measured)
            else:
                loss = relative_error(rows, dense_rows)
            extra = torch.zeros((), device=self.device)
            for stream, dense_stream in zip(streams, dense_streams, strict=True):
                extra = extra + relative_error(batch.tokens(stream), batch.tokens(dense_stream)) / len(streams)
        return loss, extra

    @staticmethod
    def _head(trunk: Trunk, values: Mapping[str, torch.Tensor]) -> Weights:
        if trunk.head is None:
            return None, None
        return values[trunk.head.weight], values[trunk.head.bias] if trunk.head.bias else None
