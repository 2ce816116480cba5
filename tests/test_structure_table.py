"""Ranks and depth as text."""

from __future__ import annotations

from dotresize_fx.depth.gone_block import GoneBlock
from dotresize_fx.rank.low_rank_linear import LowRankLinear
from dotresize_fx.structure_table import depth_table, rank_table


def linear(name: str, rows: int, columns: int, rank: int) -> LowRankLinear:
    return LowRankLinear(name, name, rows, columns, rank)


def test_a_line_a_layer() -> None:
    linears = [
        linear("model.layers.9.self_attn.q_proj", 64, 64, 20),
        linear("model.layers.9.mlp.up_proj", 256, 64, 32),
        linear("model.layers.10.mlp.up_proj", 256, 64, 8),
    ]
    assert rank_table(linears) == (
        "rank plan, full -> slim\n"
        "  layer            q_proj    up_proj\n"
        "  model.layers.9   64 -> 20  64 -> 32\n"
        "  model.layers.10  -         64 -> 8"
    )


def test_parts_of_one_name_are_told_apart() -> None:
    names = ("encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense")
    table = rank_table([linear(name, 8, 8, 3) for name in names])
    assert table.splitlines()[1:] == [
        "  layer            attention.output.dense  output.dense",
        "  encoder.layer.0  8 -> 3                  8 -> 3",
    ]


def test_a_name_without_a_layer_has_a_line_of_its_own() -> None:
    table = rank_table([linear(name, 8, 16, 3) for name in ("val_12", "onnx::MatMul_7\x1b")])
    assert table.splitlines()[1:] == [
        "  layer            rank",
        "  val_12           8 -> 3",
        "  onnx::MatMul_7   8 -> 3",
    ]


def test_seven_linears_a_layer_fit_a_terminal() -> None:
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    lines = rank_table([linear(f"model.layers.{i}.mlp.{p}", 576, 576, 115) for i in range(30) for p in parts])
    assert len(lines.splitlines()) == 32
    assert max(map(len, lines.splitlines())) <= 102


def test_blocks_are_told_in_order() -> None:
    gone = [
        GoneBlock(11, "model.layers.11", frozenset(), 12, 0.478),
        GoneBlock(3, "", frozenset()),
    ]
    assert depth_table(gone) == (
        "blocks that go, counted from 0\n"
        "  3   -                dropped\n"
        "  11  model.layers.11  merged into 12, of which it is 48%"
    )
