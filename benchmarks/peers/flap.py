"""FLAP: fluctuation as the metric, means as the compensation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .llama_layers import Calibration, PeerResult, block_weights, ffn_channels, narrow_ffn, observe


def flap_wifv(model: Any, calibration: Calibration, ratio: float, *, compensate: bool = True) -> PeerResult:
    """FLAP's WIFV on the FFNs: variance of the down projection's input times the squared norm of its column.

    The metric is standardised in each layer, and the channels with the least of it over all layers go (one stays in
    any layer). ``compensate``: what they give on average becomes the bias of the down projection. The variance is
    that over all calibration tokens; FLAP's code estimates the same in one pass, without its first sample.
    """
    before = block_weights(model)
    mlps = [layer.mlp for layer in model.model.layers]
    count = ffn_channels(model, ratio)
    moments = {mlp.down_proj: _Moments() for mlp in mlps}
    observe(model, calibration, {module: found.add for module, found in moments.items()})
    metrics = []
    for mlp in mlps:
        weight = mlp.down_proj.weight.double()
        metric = moments[mlp.down_proj].variance() * weight.square().sum(0)
        metric = (metric - metric.mean()) / metric.std()
        metric[metric.argmax()] = torch.inf
        metrics.append(metric)
    kept = torch.ones(sum(len(metric) for metric in metrics), dtype=torch.bool, device=model.device)
    kept[torch.cat(metrics).argsort()[:count]] = False
    for mlp, keep in zip(mlps, kept.split([len(metric) for metric in metrics]), strict=True):
        down = mlp.down_proj
        bias = down.bias
        if compensate:
            bias = down.weight[:, ~keep].double() @ moments[down].mean()[~keep]
            bias = bias if down.bias is None else bias + down.bias.double()
        narrow_ffn(mlp, keep.nonzero().flatten(), down.weight[:, keep], bias)
    widths = [mlp.gate_proj.out_features for mlp in mlps]
    return PeerResult(before - block_weights(model), f"FFN widths {min(widths)} to {max(widths)}, biases added")


class _Moments:
    """Mean and variance of every input channel, in float64."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sum: Tensor = torch.zeros(())
        self.squares: Tensor = torch.zeros(())

    def add(self, rows: Tensor, _: Tensor) -> None:
        rows = rows.double()
        first, second = rows.sum(0), rows.square().sum(0)
        self.sum, self.squares = (first, second) if not self.tokens else (self.sum + first, self.squares + second)
        self.tokens += len(rows)

    def mean(self) -> Tensor:
        return self.sum / self.tokens

    def variance(self) -> Tensor:
        return (self.squares / self.tokens - self.mean().square()).clamp(min=0)
