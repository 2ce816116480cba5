"""What the peers share: their result, their statistics' hooks, and setting linears of other widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dotresize_fx.gram import token_rows

Calibration = Sequence[Mapping[str, Tensor]]
Watch = Callable[[Tensor, Tensor], None]
"""What to do with a module's (input, output), both (tokens, width), of one batch."""


@dataclass(frozen=True)
class PeerResult:
    """``removed_weights`` of the blocks' linears; ``notes`` for people."""

    removed_weights: int
    notes: str


Peer = Callable[[Any, Calibration, float], PeerResult]


def block_weights(model: Any) -> int:
    """Weights of the blocks' linears as they stand in the model, zeros included."""
    return sum(linear_weights(layer) for layer in model.model.layers)


def linear_weights(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def ffn_channels(model: Any, ratio: float) -> int:
    """FFN channels over all layers that make up ``ratio`` of the block weights."""
    removed = round(ratio * block_weights(model) / channel_weights(model.model.layers[0].mlp))
    if removed > sum(layer.mlp.gate_proj.out_features - 1 for layer in model.model.layers):
        raise ValueError(f"the FFNs alone cannot give up {ratio:.0%} of the block weights")
    return removed


def channel_weights(mlp: Any) -> int:
    return 2 * mlp.gate_proj.in_features + mlp.down_proj.out_features


@torch.no_grad()
def observe(model: Any, calibration: Calibration, watches: Mapping[nn.Module, Watch]) -> None:
    """Run the model on the calibration; every watch sees its module's inputs and outputs at real tokens."""
    mask: Tensor | None = None

    def hook_of(watch: Watch) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            after = output if isinstance(output, Tensor) else output[0]
            watch(token_rows(inputs[0], mask), token_rows(after, mask))

        return hook

    handles = [module.register_forward_hook(hook_of(watch)) for module, watch in watches.items()]
    try:
        for batch in calibration:
            mask = batch["attention_mask"]
            model.model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def set_linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    """New weights of whatever width, in the dtype of the old ones."""
    dtype = linear.weight.dtype
    linear.weight = nn.Parameter(weight.detach().to(dtype).contiguous(), requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    linear.out_features, linear.in_features = weight.shape


def narrow_ffn(mlp: Any, keep: Tensor, down: Tensor, bias: Tensor | None) -> None:
    """Keep these intermediate channels, and read them by ``down``."""
    for part in (mlp.gate_proj, mlp.up_proj):
        set_linear(part, part.weight[keep], None if part.bias is None else part.bias[keep])
    set_linear(mlp.down_proj, down, bias)
