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
    """Inputs of one forward pass. ``real`` indexes the flattened (batch, length) positions; None where all are real."""

    inputs: Inputs
    real: torch.Tensor | None

    def tokens(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, length, width) -> (tokens, width) of the real positions; (batch, width) as it is."""
        if states.ndim == 2:
            return states
        rows = states.flatten(0, 1)
        return rows if self.real is None else rows.index_select(0, self.real)


class _Divergence(torch.autograd.Function):
    """The gradients are made with the loss, chunk by chunk: d KL / d logits is softmax(slim) - softmax(dense)."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        dense_states: torch.Tensor,
        dense_weight: torch.Tensor | None,
        dense_bias: torch.Tensor | None,
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
                log_q = _log_softmax(rows, slim)
                log_p = _log_softmax(dense_states[chunk].to(dtype), dense)
                p = log_p.exp()
                loss += log_p.sub_(log_q).mul_(p).sum()
                if not any(ctx.needs_input_grad):
                    continue
                change = log_q.exp_().sub_(p)
                if to_bias is not None:
                    to_bias += change.sum(0)
                narrow = change.to(dtype)
                if to_weight is not None:
                    to_weight += narrow.t() @ rows
                if to_states is not None:
                    to_states[chunk] = change if slim[0] is None else narrow @ slim[0]
        ctx.gradients = gradients
        ctx.dtypes = [part.dtype if part is not None else None for part in (states, weight, bias)]
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> Any:
        found = zip(ctx.gradients, ctx.dtypes, strict=True)
        return *(None if part is None else (part * factor).to(dtype) for part, dtype in found), None, None, None


def _cast(weights: Weights, dtype: torch.dtype) -> Weights:
    weight, bias = (None if part is None else part.detach().to(dtype) for part in weights)
    return weight, bias


def _log_softmax(rows: torch.Tensor, head: Weights) -> torch.Tensor:
    weight, bias = head
    logits = rows if weight is None else torch.nn.functional.linear(rows, weight, bias)
    return logits.float().log_softmax(-1)


def divergence(
    states: torch.Tensor, head: Weights, dense_states: torch.Tensor, dense_head: Weights = (None, None)
) -> torch.Tensor:
    """Sum over rows of KL(dense || slim) in nats, a float32 scalar; gradients go to ``states`` and ``head``.

    Args:
        states: (tokens, width) what the head reads; the logits themselves where the head is (None, None).
        head: weight (vocabulary, width) and bias (vocabulary,) or None.
        dense_states, dense_head: the same of the dense model, perhaps of another width; no gradient.

    Products are computed in autocast's dtype where that is on, in the states' own elsewhere; softmax in float32.
    """
    loss: torch.Tensor = _Divergence.apply(states, *head, dense_states, *dense_head)  # type: ignore[no-untyped-call]
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

    def __call__(self, values: Mapping[str, torch.Tensor], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum over outputs, sum over tokens of the streams' mean relative error), float32 scalars.

        ``values`` are the slim program's parameters and buffers by key.
        """
        with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision is not None):
            with torch.no_grad():
                expected, dense_streams = self.dense(self.dense_values, batch.inputs)
            found, streams = self.slim(values, batch.inputs)
            rows, dense_rows = batch.tokens(found), batch.tokens(expected)
            if self.task == "decoder":
                heads = self._head(self.slim, values), self._head(self.dense, self.dense_values)
                loss = divergence(rows, heads[0], dense_rows, heads[1])
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
