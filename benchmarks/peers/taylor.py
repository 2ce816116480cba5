"""Torch-Pruning, the tool itself."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import Any

from .llama_layers import Calibration, PeerResult, block_weights, ffn_channels

# Each costs a backward pass.
TAYLOR_BATCHES = 64


def torch_pruning_taylor(model: Any, calibration: Calibration, ratio: float) -> PeerResult:
    """Torch-Pruning's MetaPruner with its first-order Taylor importance on the language-model loss, FFN width only.

    The gradient is that of the summed losses of at most ``TAYLOR_BATCHES`` calibration batches. All layers lose the
    same width, to within the one channel that makes the sum right. No repair follows, as the tool offers none.
    """
    import torch_pruning as tp

    before = block_weights(model)
    model.requires_grad_(True)
    model.zero_grad()
    for batch in calibration[:TAYLOR_BATCHES]:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels, use_cache=False).loss.backward()
    mlps = [layer.mlp for layer in model.model.layers]
    widths = [mlp.gate_proj.out_features for mlp in mlps]
    cut = [mlp.gate_proj for mlp in mlps] + [mlp.up_proj for mlp in mlps]
    with warnings.catch_warnings():
        # The norms' gains count as parameters outside of layers, of which it warns; nothing here prunes them.
        warnings.simplefilter("ignore", UserWarning)
        pruner = tp.pruner.MetaPruner(
            model,
            example_inputs=calibration[0]["input_ids"][:1, :16],
            importance=tp.importance.GroupTaylorImportance(),
            pruning_ratio=0.0,
            # Half a channel less than asked, because the tool rounds what it keeps down.
            pruning_ratio_dict={
                mlp.gate_proj: max(0.0, removed - 0.5) / width
                for mlp, removed, width in zip(mlps, _even(ffn_channels(model, ratio), len(mlps)), widths, strict=True)
            },
            ignored_layers=[part for part in model.modules() if not list(part.children()) and part not in cut],
            forward_fn=lambda module, ids: module(input_ids=ids, use_cache=False).logits,
        )
    pruner.step()
    model.zero_grad()
    model.requires_grad_(False)
    batches = min(len(calibration), TAYLOR_BATCHES)
    return PeerResult(
        before - block_weights(model), f"Torch-Pruning {version('torch-pruning')}, Taylor on {batches} batches"
    )


def _even(total: int, parts: int) -> list[int]:
    """``total`` in ``parts`` whole numbers that differ by one at most."""
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]
