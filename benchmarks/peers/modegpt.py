"""MoDeGPT, reconstructed: a decomposition for every pair of matrices, depths by influence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dotresize_fx.gram import GramAccumulator

from .llama_layers import (
    Calibration,
    PeerResult,
    Watch,
    channel_weights,
    linear_weights,
    narrow_ffn,
    observe,
    set_linear,
)

# No layer may lose more than this share: at high ratios the softmax alone would take more than a layer has.
LARGEST_SHARE = 0.8


def modegpt(
    model: Any,
    calibration: Calibration,
    ratio: float,
    *,
    temperature: float = 0.1,
    ridge: float = 1e-3,
    least_squares: bool = True,
) -> PeerResult:
    """A reconstruction of MoDeGPT: every module of a block cut by its own decomposition, in one pass.

    Known of it: layer l loses the share L * ratio * softmax(-influence / temperature), influence being 1 - cosine of
    the block's input and output; the FFN keeps the intermediate channels of the highest ridge leverage
    diag(C (C + ridge)^-1) and refits the down projection by least squares (Nystrom); each KV head keeps the rotary
    pairs with the highest norm of queries times norm of keys, summed over its query heads; V and O of a KV head
    become the truncated SVD of their product under the metric of the block's inputs. All statistics are the dense
    model's. FFN and attention of a layer lose the same share.

    Chosen here: the temperature; ``ridge`` as a share of C's mean diagonal, in the scores and in the least squares;
    no layer loses more than ``LARGEST_SHARE``; the O parts of a KV head's query heads are decomposed side by side;
    attention rounds to whole pairs and ranks, and the layer's FFN takes up the difference to the channel.
    Temperature and ridge matter little: on SmolLM2-135M (20 % off, 12 thousand calibration tokens, dense perplexity
    14.6), temperatures of 0.03 to 1000 and ridges of 1e-5 to 0.1 gave 20.5 to 21.2.

    Attention keeps its shapes: dropped pairs and ranks are zero rows (columns in O), which is the same function as
    removing them, since scores are scaled by the dense head size either way; they count as removed.
    ``least_squares`` off drops the channels' columns and nothing more.
    """
    layers, config = model.model.layers, model.config
    if any(p.bias is not None for layer in layers for p in layer.self_attn.children() if isinstance(p, nn.Linear)):
        raise ValueError("attention with biases is not covered")
    grams = {part: GramAccumulator() for layer in layers for part in (layer.mlp.down_proj, layer.self_attn.v_proj)}
    energies = {part: _Energy() for layer in layers for part in (layer.self_attn.q_proj, layer.self_attn.k_proj)}
    influences = {layer: _Influence() for layer in layers}
    watches: dict[nn.Module, Watch] = {part: lambda x, _, gram=gram: gram.add(x) for part, gram in grams.items()}
    watches |= {part: energy.add for part, energy in energies.items()}
    observe(model, calibration, watches | {layer: found.add for layer, found in influences.items()})

    influence = torch.stack([influences[layer].value() for layer in layers])
    shares = _softmax_shares(influence, ratio, temperature)
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, layers[0].self_attn.head_dim
    removed = 0
    for done, layer in enumerate(layers):
        attention, mlp, share = layer.self_attn, layer.mlp, shares[done]
        pairs, rank = (max(1, round((1 - share) * width)) for width in (size // 2, size))
        _keep_pairs(attention, energies, groups, pairs)
        _truncate_values(attention, grams[attention.v_proj].gram, groups, rank)
        # A pair has two rows in each query and key head, a rank one row in each V and one column in each O.
        removed += (2 * (size // 2 - pairs) + size - rank) * (heads + groups) * config.hidden_size
        wanted = sum(shares[: done + 1]) * (linear_weights(attention) + linear_weights(mlp))
        width = mlp.gate_proj.out_features
        channels = min(max(0, round((wanted - removed) / channel_weights(mlp))), width - 1)
        gram = grams[mlp.down_proj].gram
        loading = ridge * gram.diagonal().mean() * torch.eye(width, dtype=gram.dtype, device=gram.device)
        leverage = torch.linalg.solve(gram + loading, gram).diagonal()
        keep, drop = leverage.argsort(descending=True, stable=True).tensor_split([width - channels])
        keep = keep.sort().values
        weight = mlp.down_proj.weight.double()
        down = weight[:, keep]
        if least_squares and channels:
            inner = (gram + loading)[keep][:, keep]
            down = down + torch.linalg.solve(inner, gram[keep][:, drop] @ weight[:, drop].T).T
        removed += channels * channel_weights(mlp)
        narrow_ffn(mlp, keep, down, mlp.down_proj.bias)
    notes = f"reconstruction; layers lose {min(shares):.0%} to {max(shares):.0%}; attention counted, kept as zeros"
    return PeerResult(removed, notes)


class _Energy:
    """Sum of squares of every output channel."""

    def __init__(self) -> None:
        self.squares: Tensor | float = 0.0

    def add(self, _: Tensor, rows: Tensor) -> None:
        self.squares = self.squares + rows.double().square().sum(0)


class _Influence:
    """1 - mean cosine of input and output."""

    def __init__(self) -> None:
        self.tokens, self.cosines = 0, torch.zeros(())

    def add(self, before: Tensor, after: Tensor) -> None:
        self.cosines = nn.functional.cosine_similarity(before.double(), after.double()).sum() + self.cosines
        self.tokens += len(before)

    def value(self) -> Tensor:
        return 1 - self.cosines / self.tokens


def _softmax_shares(influence: Tensor, ratio: float, temperature: float) -> list[float]:
    """Shares of mean ``ratio``; what a layer cannot give goes to the others in proportion."""
    if ratio > LARGEST_SHARE:
        raise ValueError(f"no more than {LARGEST_SHARE:.0%} can go")
    weights = (-influence / temperature).softmax(0)
    shares = weights * ratio * len(weights)
    for _ in range(len(weights)):
        full = shares >= LARGEST_SHARE
        if full.all() or not (shares > LARGEST_SHARE).any():
            break
        left = ratio * len(weights) - LARGEST_SHARE * full.sum()
        shares = torch.where(full, LARGEST_SHARE, weights * left / weights[~full].sum())
    return shares.tolist()


def _keep_pairs(attention: Any, energies: Mapping[nn.Module, _Energy], groups: int, pairs: int) -> None:
    """Zero the rotary pairs (i, i + half) of every KV head and its query heads, all but ``pairs`` of them."""
    half = attention.head_dim // 2
    # Rotation leaves the energy of a pair as it is, so that these are the norms after it too.
    query, key = (
        energies[part].squares.view(groups, -1, 2, half).sum(2).sqrt() for part in (attention.q_proj, attention.k_proj)
    )
    dropped = (query * key).sum(1).argsort(1)[:, : half - pairs]
    mask = torch.ones(groups, half, dtype=query.dtype, device=query.device).scatter(1, dropped, 0.0)
    for part in (attention.q_proj, attention.k_proj):
        rows = mask[:, None, None].expand(groups, part.out_features // groups // half // 2, 2, half).reshape(-1, 1)
        set_linear(part, part.weight * rows)


def _truncate_values(attention: Any, gram: Tensor, groups: int, rank: int) -> None:
    """V and O of every KV head at ``rank``: the SVD of C^(1/2) V' [O_1' ... O_g'], C being the Gram of V's inputs."""
    size = attention.head_dim
    if rank == size:
        return
    values = attention.v_proj.weight.double().view(groups, size, -1)
    # (groups, size, query heads of the group x hidden)
    outputs = attention.o_proj.weight.double().view(-1, groups, attention.num_key_value_groups, size)
    outputs = outputs.permute(1, 3, 2, 0).flatten(2)
    # C^(1/2) V' = (orthonormal columns) root', so that the SVD of root' O is that of the product.
    energy, basis = torch.linalg.eigh(values @ gram @ values.mT)
    energy = energy.clamp(min=1e-12 * energy.max())
    root = basis * energy.sqrt()[:, None]
    left = torch.linalg.svd(root.mT @ outputs, full_matrices=False)[0][..., :rank]
    down = (basis / energy.sqrt()[:, None] @ left).mT @ values
    up = (root @ left).mT @ outputs
    down, up = (nn.functional.pad(part, (0, 0, 0, size - rank)) for part in (down, up))
    up = up.unflatten(2, (attention.num_key_value_groups, -1)).permute(3, 0, 2, 1)
    set_linear(attention.v_proj, down.flatten(0, 1))
    set_linear(attention.o_proj, up.flatten(1))
