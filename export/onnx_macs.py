"""Multiply-accumulates of ONNX nodes, from the shapes that they met in a run.

Counted as torch.utils.flop_counter counts them: products of matrices and convolutions, attention over all pairs of
positions (no causal half is saved), and nothing elementwise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod

Shape = Sequence[int]
# Nodes of further kinds that multiply too: what holds them is counted too low, which a caller should say. Those of
# experts do not tell in their shapes how many a token is routed to, packed attentions not where a sequence ends.
_MULTIPLIES = re.compile(
    "MatMul|Gemm|Attention|Conv|MoE|LSTM|GRU|RNN|DeltaNet|DFT|Rfft|Irfft|CDist|Inverse|BeamSearch|GreedySearch|Sampling"
)

_PRODUCTS = (
    "MatMul",
    "FusedMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "MatMulBnb4",
    "DynamicQuantizeMatMul",
    "MatMulInteger16",
    "QLinearMatMul",
    "QOrderedMatMul",
    "FusedMatMulActivation",
    "TransposeMatMul",
    "GemmFastGelu",
)
_TURNING = ("FusedMatMul", "FusedMatMulActivation", "TransposeMatMul")
_GEMMS = ("Gemm", "FusedGemm", "QGemm", "GemmFloat8")
_CONVOLUTIONS = ("Conv", "FusedConv", "ConvInteger", "NhwcFusedConv", "NhwcConv")
_ATTENTIONS = (
    "Attention",
    "QAttention",
    "MultiHeadAttention",
    "GroupQueryAttention",
    "DecoderMaskedMultiHeadAttention",
)


def node_macs(op: str, inputs: Sequence[Shape], outputs: Sequence[Shape], equation: str = "") -> int | None:
    """MACs of one run of one node; 0 for kinds that do not multiply matrices, None where the shapes do not tell.

    Args:
        op: its kind.
        inputs: the shapes of its inputs; those that are left out are left out here too.
        outputs: of its outputs.
        equation: of an Einsum.
    """
    try:
        return _macs(op, inputs, outputs, equation)
    except (IndexError, ValueError, ZeroDivisionError):
        return None


def _macs(op: str, inputs: Sequence[Shape], outputs: Sequence[Shape], equation: str) -> int | None:
    if op in _PRODUCTS:
        first, out = inputs[0], outputs[0]
        # These may take their first matrix the other way round.
        turned = op in _TURNING and len(first) > 1 and len(out) > 1 and first[-2] != out[-2]
        return prod(out) * first[-2 if turned else -1]
    if op == "MatMulNBitsQkv":  # queries, keys and values of one input
        return prod(inputs[0]) * sum(shape[-1] for shape in outputs[:3])
    if op == "MatMulNBitsMlp":  # a gate and what it gates
        return 2 * prod(outputs[0]) * inputs[0][-1]
    if op in _GEMMS:
        return prod(inputs[0]) * outputs[0][1]
    if op in _CONVOLUTIONS:
        return prod(outputs[0]) * prod(inputs[1][1:])
    if op == "QLinearConv":
        return prod(outputs[0]) * prod(inputs[3][1:])
    if op == "ConvTranspose":
        return prod(inputs[0]) * prod(inputs[1][1:])
    if op == "Einsum":
        return _einsum(inputs, equation)
    if op in _ATTENTIONS:
        return _attention(op, inputs, outputs)
    return None if _MULTIPLIES.search(op) else 0


def _attention(op: str, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """Queries of all heads against all keys, and the mixing of the values: keys x (elements of Q + of the output)."""
    query, out = inputs[0], outputs[0]
    if op in ("Attention", "QAttention") and len(query) == 3 and len(inputs[1]) == 2:
        # ONNX Runtime's own, with its projection to queries, keys and values; those of queries are as many as of keys.
        queries = prod(query[:2]) * (inputs[1][1] - out[-1]) // 2
        return prod(query) * inputs[1][1] + _keys(query, outputs) * (queries + prod(out))
    if op == "GroupQueryAttention":  # heads of keys and values are of one size; the query may hold all three
        return 2 * prod(out) * _keys(query, outputs)
    if len(query) == 5:  # (batch, length, heads, 3, size)
        return 2 * prod(out) * _keys(query, outputs)
    key = inputs[1]
    keys = _keys(key if len(key) in (3, 5) else (key[0], key[2]), outputs)
    return keys * (prod(query) + prod(out))


def _keys(source: Shape, outputs: Sequence[Shape]) -> int:
    """How many keys there are: those of the cache that goes out, or the length of ``source``."""
    grown = [shape for shape in outputs[1:] if len(shape) in (4, 5)]
    if not grown:
        return source[1]
    scores = len(grown) == 1 and len(grown[0]) == 4  # a cache goes out as two of four axes or as one of five
    return grown[0][-1 if scores else -2]


def _einsum(inputs: Sequence[Shape], equation: str) -> int | None:
    left = equation.replace(" ", "").partition("->")[0]
    if not left or "." in left or len(inputs) > 2:
        return None
    sizes: dict[str, int] = {}
    for labels, shape in zip(left.split(","), inputs, strict=True):
        sizes.update(zip(labels, shape, strict=True))
    return prod(sizes.values()) if len(inputs) == 2 else 0
