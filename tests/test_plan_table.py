"""The width plan as text: a line a layer, in columns."""

from __future__ import annotations

from dataclasses import replace

from dotresize_fx.plan_table import plan_table
from dotresize_fx.regions import Region, RegionKind, Symmetry


def region(name: str, kind: RegionKind, width: int) -> Region:
    return Region(name, kind, Symmetry.PERMUTATION, width, ("w",), ("r",))


def layer(number: int) -> list[Region]:
    heads = f"model.layers.{number}.self_attn"
    return [
        region(f"{heads} kv_heads", RegionKind.HEADS, 3),
        region(f"{heads} query_key", RegionKind.QUERY_KEY, 64),
        region(f"{heads} value", RegionKind.VALUE, 64),
        region(f"model.layers.{number}.mlp", RegionKind.FFN, 1536),
    ]


STREAM = region("residual stream", RegionKind.RESIDUAL, 576)


def test_a_line_a_layer() -> None:
    regions = [*layer(0), *layer(10)]
    widths = {one.name: one.width for one in regions}
    widths |= {"model.layers.0.mlp": 96, "model.layers.0.self_attn value": 48, "model.layers.10.self_attn kv_heads": 2}
    assert plan_table([STREAM, *regions], widths) == (
        "width plan, dense -> slim\n"
        "  layer            FFN         value head  query/key head  KV heads\n"
        "  model.layers.0   1536 -> 96  64 -> 48    64              3\n"
        "  model.layers.10  1536        64          64              3 -> 2"
    )


def test_thirty_layers_stay_short() -> None:
    regions = [one for number in range(30) for one in layer(number)]
    lines = plan_table(regions, {one.name: one.width // 2 for one in regions}).splitlines()
    assert len(lines) == 32
    assert max(map(len, lines)) <= 80


def test_the_stream_stands_above_the_layers() -> None:
    table = plan_table([STREAM, *layer(0)[3:]], {"residual stream": 512, "model.layers.0.mlp": 1536})
    assert table.splitlines()[1:] == [
        "  residual stream  576 -> 512",
        "  layer           FFN",
        "  model.layers.0  1536",
    ]
    assert plan_table([STREAM], {"residual stream": 512}).splitlines()[1:] == ["  residual stream  576 -> 512"]


def test_only_planned_widths_and_columns_that_hold_some() -> None:
    regions = [*layer(0), region("model.layers.1 plain", RegionKind.PLAIN, 8)]
    table = plan_table(regions, {"model.layers.0.self_attn value": 8, "model.layers.1 plain": 8})
    assert table.splitlines()[1:] == ["  layer           value head", "  model.layers.0  64 -> 8"]


def test_a_width_that_a_layer_lacks_and_one_that_it_has_twice() -> None:
    """Of two FFNs in one layer the second takes a line of its own."""
    twice = replace(layer(0)[3], name="model.layers.0.second", width=8)
    regions = [layer(0)[2], layer(0)[3], twice]
    assert plan_table(regions, {one.name: one.width for one in regions}).splitlines()[2:] == [
        "  model.layers.0         1536  64",
        "  model.layers.0.second  8     -",
    ]


def test_names_without_a_number_stand_as_they_are_and_none_steers_the_terminal() -> None:
    regions = [region("blo\x1b[2Jck value", RegionKind.VALUE, 8), region("mlp", RegionKind.FFN, 8)]
    table = plan_table(regions, dict.fromkeys((one.name for one in regions), 4))
    assert table.splitlines()[2:] == ["  blo [2Jck  -       8 -> 4", "  mlp        8 -> 4  -"]


def test_nothing_to_plan() -> None:
    assert plan_table([], {}) == "width plan, dense -> slim"


def test_what_a_plan_leaves_out_is_kept() -> None:
    """A layer that it does not name at all, too; of a kind that it does not name there is no column."""
    layers = [*layer(0), *layer(1), *layer(2), region("model.layers.3.mlp", RegionKind.FFN, 8)]
    widths = {"model.layers.0.mlp": 96, "model.layers.1.self_attn value": 32}
    assert plan_table([STREAM, *layers], widths).splitlines()[1:] == [
        "  layer           FFN         value head",
        "  model.layers.0  1536 -> 96  kept",
        "  model.layers.1  kept        64 -> 32",
        "  model.layers.2  kept        kept",
        "  model.layers.3  kept        -",
    ]
