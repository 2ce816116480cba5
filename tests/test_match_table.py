"""The match report as text."""

from __future__ import annotations

from dotresize_fx.match_table import match_table
from dotresize_fx.regions import LinearMatch, MatchReport, Region, RegionKind, Symmetry

FFN = Region("mlp", RegionKind.FFN, Symmetry.PERMUTATION, 64, ("gate", "up"), ("down",))
STREAM = Region("stream", RegionKind.RESIDUAL, Symmetry.ORTHOGONAL, 32, ("down",), ("gate", "up"), norms=("norm",))
HEADS = "it is split into heads"


def test_regions_linears_and_reasons() -> None:
    linears = (
        LinearMatch("gate", "mlp.gate.weight", (64, 32), "stream", "mlp"),
        LinearMatch("down", "mlp.down.weight", (32, 64), "mlp", "stream"),
        LinearMatch("q", "q.weight", (32, 32), "stream", None, writes_reason=HEADS),
        LinearMatch("o", "o.weight", (32, 32), None, None, HEADS, "it is an output"),
    )
    table = match_table(MatchReport((STREAM, FFN), linears), {"mlp": "its weights are shared"})
    assert table == (
        "2 regions: width, who shares it, changes of basis that it allows\n"
        "  stream: residual width 32: 1 writer, 2 readers, 1 norm between; orthogonal\n"
        "  mlp: ffn width 64: 2 writers, 1 reader; permutation; left alone (1)\n"
        "\n"
        "4 linears, 3 matched\n"
        "  weight           out x in  reads   writes\n"
        "  mlp.gate.weight   64 x 32  stream  mlp\n"
        "  mlp.down.weight   32 x 64  mlp     stream\n"
        "  q.weight          32 x 32  stream  (2)\n"
        "  o.weight          32 x 32  (2)     (3)\n"
        "\n"
        "left alone because\n"
        "  (1) its weights are shared\n"
        "  (2) it is split into heads\n"
        "  (3) it is an output"
    )


def test_widths_of_an_attention_that_are_no_region() -> None:
    value = Region("attn value", RegionKind.VALUE, Symmetry.HEADWISE_LINEAR, 8, ("v",), ("o",), heads=2)
    table = match_table(MatchReport((value,), (), (("attn query_key", "a norm acts on the head"),)), {})
    assert table.splitlines()[1:3] == [
        "  attn value: value width 8: 2 KV heads, 1 writer, 1 reader; general linear per KV head",
        "  attn query_key: none (1)",
    ]
    assert table.endswith("  (1) a norm acts on the head")


def test_nothing_left_alone() -> None:
    linear = LinearMatch("gate", "gate.weight", (64, 32), "stream", "mlp")
    table = match_table(MatchReport((FFN,), (linear,)), {})
    assert "left alone" not in table
    assert table.splitlines()[0].startswith("1 region: ")
    assert "1 linear, 1 matched" in table


def test_a_graph_without_linears() -> None:
    assert "0 linears, 0 matched" in match_table(MatchReport((), ()), {})
