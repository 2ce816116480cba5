"""Other tools' methods on a Hugging Face Llama, to stand beside ours in one table.

A peer is a function ``(model, calibration, ratio) -> PeerResult``. It cuts a float32 ``LlamaForCausalLM`` (its own
copy, on any device) in place, so that ``ratio`` of the blocks' linear weights (q, k, v, o, gate, up and down of all
layers; biases and norms do not count) is gone. The model still runs; widths then differ from layer to layer, so that
its configuration no longer describes it. ``calibration`` is a list of ``{"input_ids", "attention_mask"}`` on the
model's device; padding counts nowhere. What each one is:

``torch_pruning_taylor``
    The real tool: PyPI's torch-pruning (seen working: 1.6.1), an optional dependency: ``pip install torch-pruning``.
``flap_wifv``
    FLAP (arXiv 2312.11983): the metric, the global threshold and the compensation of its published code, written
    anew and held to the FFN; FLAP itself also removes attention heads by the same metric.
``modegpt``
    A reconstruction of MoDeGPT (arXiv 2408.09632) from what is known of its recipe, not from code of its authors: its
    docstring says what is known and what is chosen here.

The share that a peer removed is ``PeerResult.removed_weights`` over the dense model's ``block_weights``: modegpt leaves
the attention weights it removes in place as zeros, where ``block_weights`` of the cut model still counts them.
"""

from __future__ import annotations

from .flap import flap_wifv
from .llama_layers import Calibration, Peer, PeerResult, block_weights
from .modegpt import modegpt
from .taylor import torch_pruning_taylor

__all__ = [
    "PEERS",
    "Calibration",
    "Peer",
    "PeerResult",
    "block_weights",
    "flap_wifv",
    "modegpt",
    "torch_pruning_taylor",
]

PEERS: dict[str, Peer] = {
    "torch-pruning-taylor": torch_pruning_taylor,
    "flap-wifv": flap_wifv,
    "modegpt": modegpt,
}
