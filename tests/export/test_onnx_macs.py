"""MACs by the formula of each op; test_emit_onnx counts a whole file beside torch."""

from __future__ import annotations

import re

import numpy as np
import pytest

from dotresize_fx.export.onnx_macs import node_macs

# batch 2, 3 new tokens behind 5 cached ones, 4 heads of 8 over 2 KV heads
Q, OUT, CACHE = (2, 3, 32), (2, 3, 32), (2, 2, 8, 8)
SCORES_AND_MIXING = 2 * 4 * 3 * 8 * (8 + 8)


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "expected"),
    [
        ("MatMul", [(2, 3, 8)], [(2, 3, 5)], 2 * 3 * 5 * 8),  # without its weight, which ONNX Runtime packed away
        ("MatMul", [(4, 3, 8), (4, 8, 5)], [(4, 3, 5)], 4 * 3 * 5 * 8),
        ("MatMul", [(8,), (8, 5)], [(5,)], 40),
        ("FusedMatMul", [(4, 8, 3), (4, 8, 5)], [(4, 3, 5)], 4 * 3 * 5 * 8),  # the first one transposed
        ("MatMulNBits", [(2, 3, 64), (48, 2, 16)], [(2, 3, 48)], 2 * 3 * 48 * 64),
        ("Gemm", [(6, 8), (8, 5), (5,)], [(6, 5)], 6 * 8 * 5),
        ("Gemm", [(8, 6), (5, 8)], [(6, 5)], 6 * 8 * 5),
        ("Conv", [(1, 4, 9, 9), (6, 2, 3, 3)], [(1, 6, 7, 7)], 6 * 49 * 2 * 9),  # two groups
        ("ConvTranspose", [(1, 4, 5, 5), (4, 6, 3, 3)], [(1, 6, 7, 7)], 4 * 25 * 6 * 9),
        ("QLinearConv", [(1, 4, 9, 9), (), (), (6, 4, 3, 3)], [(1, 6, 7, 7)], 6 * 49 * 4 * 9),
        ("GroupQueryAttention", [Q, (2, 3, 16), (2, 3, 16)], [OUT, CACHE, CACHE], SCORES_AND_MIXING),
        ("GroupQueryAttention", [(2, 3, 64)], [OUT, CACHE, CACHE], SCORES_AND_MIXING),  # packed
        ("Attention", [(2, 4, 3, 8), (2, 2, 8, 8), (2, 2, 8, 8)], [(2, 4, 3, 8)], SCORES_AND_MIXING),
        ("Attention", [Q, (2, 8, 16), (2, 8, 16)], [OUT], SCORES_AND_MIXING),
        ("Attention", [(2, 3, 20), (20, 96), (96,)], [OUT], 2 * 3 * 20 * 96 + 2 * 4 * 3 * 3 * 16),  # projects too
        ("MultiHeadAttention", [Q, (2, 8, 32), (2, 8, 32)], [OUT], SCORES_AND_MIXING),
        ("MultiHeadAttention", [Q, (2, 4, 8, 8), (2, 4, 8, 8)], [OUT], SCORES_AND_MIXING),
        ("MultiHeadAttention", [(2, 3, 4, 3, 8)], [OUT], 2 * 4 * 3 * 3 * 16),  # packed
        ("MatMulInteger", [(2, 3, 8), (8, 5), (), ()], [(2, 3, 5)], 2 * 3 * 5 * 8),
        ("DynamicQuantizeMatMul", [(2, 3, 8), (8, 5), (5,)], [(2, 3, 5)], 2 * 3 * 5 * 8),
        ("QLinearMatMul", [(2, 3, 8), (), (), (8, 5), (), (), (), ()], [(2, 3, 5)], 2 * 3 * 5 * 8),
        ("QGemm", [(6, 8), (), (), (8, 5), (), ()], [(6, 5)], 6 * 8 * 5),
        ("MatMulNBitsQkv", [(2, 3, 64), (2, 3, 64), (64,)], [(2, 3, 48), (2, 3, 16), (2, 3, 16)], 2 * 3 * 64 * 80),
        ("MatMulNBitsMlp", [(2, 3, 64)], [(2, 3, 48)], 2 * 2 * 3 * 48 * 64),
        ("QAttention", [(2, 3, 20), (20, 96), (96,), (), (96,)], [OUT], 2 * 3 * 20 * 96 + 2 * 4 * 3 * 3 * 16),
        # Values of another size than queries and keys, behind a past.
        (
            "Attention",
            [(2, 3, 20), (20, 80), (80,)],
            [(2, 3, 16), (2, 2, 4, 8, 8)],
            2 * 3 * 20 * 80 + 2 * 4 * 3 * 8 * 12,
        ),
        # Of Attention's further outputs the last one alone: scores are no cache.
        ("Attention", [(2, 4, 3, 8), (2, 2, 8, 8), (2, 2, 8, 8)], [(2, 4, 3, 8), (2, 4, 3, 8)], SCORES_AND_MIXING),
        ("Add", [(2, 3), (3,)], [(2, 3)], 0),
        ("LSTM", [(2, 3, 4)], [(2, 1, 3, 4)], None),
        ("MatMul", [], [], None),
    ],
)
def test_a_node(op: str, inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]], expected: int | None) -> None:
    assert node_macs(op, inputs, outputs) == expected


def test_an_einsum_is_counted_by_its_equation() -> None:
    left, right = np.ones((2, 3, 4)), np.ones((2, 5, 4))
    assert np.einsum("bij,bkj->bik", left, right).shape == (2, 3, 5)
    assert node_macs("Einsum", [left.shape, right.shape], [(2, 3, 5)], "bij, bkj -> bik") == 2 * 3 * 5 * 4
    assert node_macs("Einsum", [left.shape], [(2, 3)], "bij->bi") == 0
    assert node_macs("Einsum", [left.shape, right.shape], [(2, 3, 5)], "...ij,...kj->...ik") is None


def test_what_multiplies_and_is_not_counted_is_not_zero() -> None:
    """Of all kinds that this ONNX Runtime knows, those that are 0 whatever their shapes hold no product."""
    state = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    names = {schema.name for schema in state.get_all_operator_schema()}
    assert {"MoE", "QMoE", "PackedAttention", "PackedMultiHeadAttention", "LSTM", "GatedDeltaNet"} <= names
    silent = {name for name in names if node_macs(name, [], []) == 0}
    telling = re.compile("MatMul|Gemm|Attention|Conv|MoE|RNN|LSTM|GRU|Einsum|DeltaNet")
    assert {name for name in silent if telling.search(name)} == set()
    assert {"Add", "Softmax", "RotaryEmbedding", "SkipSimplifiedLayerNormalization", "Gather"} <= silent
