"""What a ratio becomes: of which cost it is, on which grid, and with heads of one size where that is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from dotresize_fx.cost import CostModel
from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.export.capture import capture
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.options import Options
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.plan_widths import pair_heads
from dotresize_fx.passes.prove_exactness import redraw_parameters
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.passes.sweep_regions import Slimmed
from dotresize_fx.progress import Progress
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.width_plan import step_of

LENGTH = 24


@pytest.fixture(scope="module")
def wide_heads() -> FxGraph:
    """Two layers; four query heads of 32 share two KV heads, which leaves multiples of 8 to choose from."""
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    graph = capture(redraw_parameters(transformers.LlamaForCausalLM(config).eval(), 0)).graph
    canonicalise(graph)
    return graph


def slimmed(graph: FxGraph, tiny_batch: Any, **options: Any) -> Slimmed:
    data = [tiny_batch(4, LENGTH, 3, seed=seed) for seed in range(4)]
    return slim_graph(graph, find_regions(graph), data, Options(**options), Progress(quiet=True))


def largest_step(graph: FxGraph, cost: CostModel, multiple: int | None = None) -> float:
    """The share of the cost that one grid step of one region takes at most."""
    regions = [region for region in find_regions(graph).regions if region.kind is not RegionKind.RESIDUAL]
    return max(step_of(r, multiple) * cost.per_unit(graph, r) for r in regions) / cost.total(graph)


# -- costs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("regions", "allocation"),
    [((), "measured"), ((), "uniform"), (("value", "query_key"), "measured"), (("kv_heads", "ffn"), "uniform")],
)
@pytest.mark.parametrize("kind", ["weights", "macs"])
def test_the_share_of_the_cost_goes_within_one_step(
    wide_heads: FxGraph, tiny_batch: Any, kind: str, regions: tuple[str, ...], allocation: str
) -> None:
    cost = CostModel(kind, LENGTH)
    found = slimmed(wide_heads, tiny_batch, ratio=0.15, cost=kind, regions=regions, allocation=allocation)
    removed = 1 - cost.total(found.graph) / cost.total(wide_heads)
    assert removed == pytest.approx(0.15, abs=largest_step(wide_heads, cost))
    # Weights are in the report anyway.
    told = [note for note in found.notes if note.startswith("the ratio is of the ")]
    name = "blocks' MACs per token (attention over 24 tokens)"
    assert told == ([f"the ratio is of the {name}: {removed:.1%} of them went"] if kind == "macs" else [])


def test_ffns_keep_more_where_macs_count_and_the_context_is_long(wide_heads: FxGraph, tiny_batch: Any) -> None:
    """The scores and the mixing of 512 keys cost no weights: of MACs the heads hold most."""
    matches = find_regions(wide_heads)
    data = [tiny_batch(1, 512, seed=seed) for seed in range(2)]
    removed = {}
    for kind in ("weights", "macs"):
        options = Options(ratio=0.3, cost=kind, regions=("ffn", "value", "query_key"))
        widths = slim_graph(wide_heads, matches, data, options, Progress(quiet=True)).plan.widths
        removed[kind] = sum(region.width - widths[region.name] for region in matches.of_kind("ffn"))
    assert removed["macs"] < removed["weights"]


def test_a_refusal_names_the_cost(wide_heads: FxGraph, tiny_batch: Any) -> None:
    for allocation in ("measured", "uniform"):
        with pytest.raises(NothingToSlimError, match=r"of the blocks' MACs per token \(attention over 24 tokens\) and"):
            slimmed(wide_heads, tiny_batch, ratio=0.9, cost="macs", allocation=allocation)


@pytest.mark.parametrize("multiple", [4, 12])
def test_a_multiple_that_is_asked_for_holds(wide_heads: FxGraph, tiny_batch: Any, multiple: int) -> None:
    found = slimmed(wide_heads, tiny_batch, ratio=0.2, multiple=multiple)
    whole = {region.name: region for region in find_regions(wide_heads).regions}
    cut = {name: width for name, width in found.plan.widths.items() if width < whole[name].width}
    assert cut
    assert all(width % multiple == 0 for name, width in cut.items() if whole[name].kind is not RegionKind.HEADS)


# -- one width in all layers ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"allocation": "uniform"}, {"regions": ("ffn", "kv_heads")}])
def test_uniform_gives_all_layers_one_width(wide_heads: FxGraph, tiny_batch: Any, options: dict[str, Any]) -> None:
    asked = {"regions": ("ffn", "value", "query_key"), "ratio": 0.25, **options}
    found = slimmed(wide_heads, tiny_batch, uniform=True, **asked)
    regions = [region for region in find_regions(wide_heads).regions if region.name in found.plan.widths]
    widths = {
        kind: {found.plan.widths[r.name] for r in regions if r.kind is kind} for kind in {r.kind for r in regions}
    }
    assert len(regions) >= 4
    assert all(len(kinds) == 1 for kinds in widths.values())
    removed = 1 - CostModel().total(found.graph) / CostModel().total(wide_heads)
    # A step is one of every layer's; of two KV heads it is half of all.
    steps = 2 * largest_step(wide_heads, CostModel())
    assert 0.25 - (steps if options.get("allocation") else 1e-9) <= removed <= 0.25 + steps


def test_where_one_width_alone_is_to_be_found_nothing_is_measured(wide_heads: FxGraph, tiny_batch: Any) -> None:
    found = slimmed(wide_heads, tiny_batch, uniform=True, ratio=0.2, regions=("ffn",))
    assert not found.plan.losses
    assert len(set(found.plan.widths.values())) == 1


def test_measured_widths_differ_where_uniform_ones_do_not(wide_heads: FxGraph, tiny_batch: Any) -> None:
    """So that the test of uniform ones does not pass by chance."""
    widths = slimmed(wide_heads, tiny_batch, ratio=0.1, regions=("ffn",)).plan.widths
    assert len(set(widths.values())) > 1


def test_widths_are_multiples_of_what_is_asked_for_by_kind(wide_heads: FxGraph, tiny_batch: Any) -> None:
    data = [tiny_batch(4, LENGTH, 3, seed=seed) for seed in range(3)]
    options = Options(ratio=0.15, regions=("ffn", "residual"), uniform=True)
    factors = {"ffn": 12, "residual": 10}
    plan = slim_graph(wide_heads, find_regions(wide_heads), data, options, Progress(quiet=True), factors=factors).plan
    kinds = {region.name: (region.kind, region.width) for region in find_regions(wide_heads).regions}
    cut = {kinds[name][0]: width for name, width in plan.widths.items() if width < kinds[name][1]}
    assert cut.keys() == {RegionKind.FFN, RegionKind.RESIDUAL}
    assert all(width % factors[kind] == 0 for kind, width in cut.items())


# -- heads of one size -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"allocation": "uniform"}, {"cost": "macs"}, {"multiple": 4}])
def test_keys_and_values_of_one_size(wide_heads: FxGraph, tiny_batch: Any, run: Any, options: dict[str, Any]) -> None:
    asked = {"regions": ("value", "query_key", "ffn"), "ratio": 0.2, **options}
    found = slimmed(wide_heads, tiny_batch, head_sizes="equal", **asked)
    widths = found.plan.widths
    sizes = [
        (widths[f"model.layers.{layer}.self_attn query_key"], widths[f"model.layers.{layer}.self_attn value"])
        for layer in (0, 1)
    ]
    assert all(query_key == value and value % 8 == 0 for query_key, value in sizes)
    assert min(value for _, value in sizes) < 32
    assert found.notes == () or options.get("cost") == "macs"
    cost = CostModel(options.get("cost", "weights"), LENGTH)
    removed = 1 - cost.total(found.graph) / cost.total(wide_heads)
    # One step takes eight of both widths of an attention, or of an FFN one step of its grid.
    heads = [region for region in find_regions(wide_heads).of_kind("value", "query_key") if "layers.0" in region.name]
    pair = 8 * sum(cost.per_unit(wide_heads, region) for region in heads) / cost.total(wide_heads)
    assert removed == pytest.approx(0.2, abs=max(pair, largest_step(wide_heads, cost, options.get("multiple"))))
    assert run(found.graph, **tiny_batch(2, 9, 2))[0].isfinite().all()
    if options.get("allocation") != "uniform":
        assert found.plan.losses.keys() == widths.keys()


def test_free_sizes_differ_where_equal_ones_do_not(wide_heads: FxGraph, tiny_batch: Any) -> None:
    """So that the tests of equal sizes do not pass by chance."""
    widths = slimmed(wide_heads, tiny_batch, ratio=0.1, regions=("value", "query_key")).plan.widths
    assert any(
        widths[f"model.layers.{n}.self_attn query_key"] != widths[f"model.layers.{n}.self_attn value"] for n in (0, 1)
    )


def test_heads_too_narrow_for_a_multiple_of_eight(tiny_graph: Any, tiny_batch: Any) -> None:
    _, graph = tiny_graph("llama")
    found = slimmed(graph, tiny_batch, ratio=0.1, head_sizes="equal", regions=("ffn", "value", "query_key"))
    assert {name for name, width in found.plan.widths.items() if "self_attn" in name and width != 8} == set()
    assert "4 widths left alone: --head-sizes equal, and heads of 8 have no smaller multiple of 8" in found.notes
    with pytest.raises(NothingToSlimError, match=r"^4 widths left alone: --head-sizes equal, and heads of 8"):
        slimmed(graph, tiny_batch, ratio=0.1, head_sizes="equal", regions=("value", "query_key"))


def attention(name: str, query_key: int = 64, value: int = 64) -> list[Region]:
    linear = Symmetry.HEADWISE_LINEAR
    return [
        Region(f"{name} kv_heads", RegionKind.HEADS, Symmetry.PERMUTATION, 4, ("q", "k", "v"), ("o",), attention=name),
        Region(f"{name} query_key", RegionKind.QUERY_KEY, linear, query_key, ("q", "k"), (), heads=4, attention=name),
        Region(f"{name} value", RegionKind.VALUE, linear, value, ("v",), ("o",), heads=4, attention=name),
    ]


FFN = Region("ffn", RegionKind.FFN, Symmetry.PERMUTATION, 128, ("up",), ("down",))


def names(groups: Any) -> list[list[str]]:
    return [[region.name for region in group] for group in groups]


def test_pairs_of_one_attention_and_all_else_alone() -> None:
    groups, notes = pair_heads([*attention("a"), FFN, *attention("b")])
    assert names(groups) == [
        ["a kv_heads"], ["ffn"], ["b kv_heads"], ["a query_key", "a value"], ["b query_key", "b value"]
    ]  # fmt: skip
    assert notes == ()


@pytest.mark.parametrize("missing", ["query_key", "value"])
def test_where_one_of_the_two_cannot_be_cut_neither_is(missing: str) -> None:
    regions = [region for region in attention("a") if str(region.kind) != missing]
    groups, notes = pair_heads([*regions, FFN])
    assert names(groups) == [["a kv_heads"], ["ffn"]]
    assert notes == (
        f"1 width left alone: --head-sizes equal, and the {missing} width of the same heads cannot be cut",
    )


def test_keys_and_values_of_two_sizes_are_left_alone() -> None:
    groups, notes = pair_heads([*attention("a", query_key=96), *attention("b")])
    assert names(groups) == [["a kv_heads"], ["b kv_heads"], ["b query_key", "b value"]]
    assert notes == ("2 widths left alone: --head-sizes equal, and keys and values of the same heads are of two sizes",)
