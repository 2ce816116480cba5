"""plan.json: written, read back, edited, and refused with the file's name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dotresize_fx.errors import UsageError
from dotresize_fx.options import Options
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.passes.sweep_regions import Slimmed
from dotresize_fx.plan_file import read_plan, write_plan
from dotresize_fx.progress import Progress
from dotresize_fx.width_plan import WidthPlan

QUIET = Progress(quiet=True)
names = st.text(st.characters(codec="utf-8"), max_size=12)


@given(widths=st.dictionaries(names, st.integers(0, 10**6), min_size=1, max_size=6), losses=st.booleans())
def test_widths_come_back(tmp_path_factory: Any, widths: dict[str, int], losses: bool) -> None:
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    write_plan(WidthPlan(widths, dict.fromkeys(widths, 0.25) if losses else {}), file)
    assert read_plan(file) == WidthPlan(widths)
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content.get("predicted_losses", {}) == (dict.fromkeys(widths, 0.25) if losses else {})


BAD = {
    "not JSON": ("{widths", "not valid JSON"),
    "not text": (b"\xff\xfe\x00", "not valid JSON"),
    "a list": ("[1, 2]", "not a width plan"),
    "no widths": ('{"schema_version": 1}', "not a width plan"),
    "widths of another kind": ('{"schema_version": 1, "widths": [64]}', "not a width plan"),
    "no version": ('{"widths": {}}', "not a width plan"),
    "another version": ('{"schema_version": 2, "widths": {}}', '"schema_version": 1'),
    "a plan of nothing": ('{"schema_version": 1, "widths": {}}', "it names no width, so it cuts nothing"),
    "a width that is text": ('{"schema_version": 1, "widths": {"ffn": "64"}}', "the width of 'ffn' must be a whole"),
    "a broken width": ('{"schema_version": 1, "widths": {"ffn": 6.5}}', "whole number, not 6.5"),
    "a truth": ('{"schema_version": 1, "widths": {"ffn": true}}', "whole number, not True"),
    "nothing": ("", "not valid JSON"),
}


@pytest.mark.parametrize("kind", BAD)
def test_files_that_are_no_plan(tmp_path: Path, kind: str) -> None:
    content, said = BAD[kind]
    file = tmp_path / "my plan.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as caught:
        read_plan(file)
    assert str(caught.value).startswith(f"--plan {file}: ")
    assert said in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for file in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UsageError, match="cannot be read: ") as caught:
            read_plan(file)
        assert str(file) in str(caught.value)


# -- followed --------------------------------------------------------------------------------------


def follow(tiny_graph: Any, tiny_batch: Any, widths: Mapping[str, int], kind: str = "llama", **options: Any) -> Slimmed:
    _, dense = tiny_graph(kind)
    batches = [tiny_batch(4, 24, 3, seed=seed) for seed in range(3)]
    chosen = Options(check=True, **options)
    return slim_graph(dense, find_regions(dense), batches, chosen, QUIET, plan=WidthPlan(widths))


PLANS: dict[str, dict[str, int]] = {
    "one FFN": {"model.layers.0.mlp": 37},
    "heads of one layer, sizes of the other": {
        "model.layers.0.self_attn kv_heads": 1,
        "model.layers.1.self_attn query_key": 6,
        "model.layers.1.self_attn value": 5,
        "model.layers.1.mlp": 8,
    },
    "whole widths beside cut ones": {"model.layers.0.self_attn kv_heads": 2, "model.layers.0.self_attn value": 3},
    "the stream and heads": {"residual stream": 28, "model.layers.0.self_attn kv_heads": 1, "model.layers.1.mlp": 50},
    "the stream alone": {"residual stream": 24},
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_is_followed_exactly(tiny_graph: Any, tiny_batch: Any, run: Any, plan: str) -> None:
    """Whatever regions and ratio say; and twice alike to the last bit."""
    widths = PLANS[plan]
    slimmed = follow(tiny_graph, tiny_batch, widths, ratio=0.0)
    found = {region.name: region.width for region in find_regions(slimmed.graph).regions}
    whole = {region.name: region.width for region in find_regions(tiny_graph("llama")[1]).regions}
    expected = whole | widths
    if "the stream" in plan:  # widths of heads do not depend on it, nor the other way about
        assert found["residual stream"] == widths["residual stream"]
    for name, width in expected.items():
        # One KV head alone is no longer a choice.
        assert name not in found or found[name] == width, name
        assert name in found or (name.endswith("kv_heads") and width == 1), name
    assert {name: width for name, width in slimmed.plan.widths.items() if width < whole[name]} == {
        name: width for name, width in widths.items() if width < whole[name]
    }
    assert run(slimmed.graph, **tiny_batch(2, 9, 2))[0].isfinite().all()
    again = follow(tiny_graph, tiny_batch, widths, ratio=0.0)
    first, second = (one.graph.program.state_dict for one in (slimmed, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("regions", [(), ("residual",), ("residual", "ffn"), ("query_key",), ("ffn", "value")])
def test_the_plan_that_a_run_wrote_gives_that_run_again(
    tiny_graph: Any, tiny_batch: Any, tmp_path: Path, regions: tuple[str, ...]
) -> None:
    _, dense = tiny_graph("opt")
    batches = [tiny_batch(4, 24, 3, seed=seed) for seed in range(3)]
    planned = slim_graph(dense, find_regions(dense), batches, Options(ratio=0.1, regions=regions), QUIET)
    write_plan(planned.plan, tmp_path / "plan.json")
    plan = read_plan(tmp_path / "plan.json")
    followed = slim_graph(dense, find_regions(dense), batches, Options(), QUIET, plan=plan)
    assert followed.plan.widths == planned.plan.widths
    first, second = (one.graph.program.state_dict for one in (planned, followed))
    assert all(torch.equal(first[name], second[name]) for name in first | second)


REFUSED: dict[str, tuple[dict[str, int], str]] = {
    "a name that is none": ({"model.layers.7.mlp": 32}, "--plan names 'model.layers.7.mlp', which is no width"),
    "wider than it is": ({"model.layers.0.mlp": 65}, "must be from 1 to 64"),
    "no width": ({"model.layers.0.mlp": 0}, "must be from 1 to 64"),
    "whole widths": ({"model.layers.0.mlp": 64, "model.layers.1.mlp": 64}, "--plan cuts nothing: every width in it"),
    "half a rotary pair": ({"model.layers.0.self_attn query_key": 5}, "rotary pairs need an even one"),
    "heads and values": (
        {"model.layers.0.self_attn kv_heads": 1, "model.layers.0.self_attn value": 4},
        "--plan cuts 'model.layers.0.self_attn value' and whole KV heads of the same attention",
    ),
    "heads and scores": (
        {"model.layers.1.self_attn kv_heads": 1, "model.layers.1.self_attn query_key": 4},
        "--plan cuts 'model.layers.1.self_attn query_key' and whole KV heads",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_plans_that_cannot_be_followed(tiny_graph: Any, tiny_batch: Any, kind: str) -> None:
    widths, said = REFUSED[kind]
    with pytest.raises(UsageError) as caught:
        follow(tiny_graph, tiny_batch, widths)
    assert said in str(caught.value)


def test_odd_widths_are_fine_where_nothing_rotates(tiny_graph: Any, tiny_batch: Any) -> None:
    name = "model.decoder.layers.0.self_attn query_key"
    assert follow(tiny_graph, tiny_batch, {name: 5}, "opt").plan.widths[name] == 5


def test_a_width_that_is_found_and_cannot_be_cut(trace: Any) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x + m.down(torch.relu(m.up(x)))
        return m.head(torch.relu(y + m.second(m.first(y))))  # type: ignore[no-any-return]

    linear = torch.nn.Linear
    parts = {"up": linear(8, 32), "down": linear(32, 8), "first": linear(8, 16), "second": linear(16, 8)}
    graph = trace(forward, (2, 8), **parts, head=linear(8, 3))
    matches = find_regions(graph)
    (plain,) = matches.of_kind("plain")
    batches = [{"x": torch.ones(4, 8)}]
    with pytest.raises(UsageError, match="which cannot be cut: nothing but linear ops between"):
        slim_graph(graph, matches, batches, Options(), QUIET, plan=WidthPlan({plain.name: 4}))


def test_a_plan_of_nothing_cuts_nothing(tiny_graph: Any, tiny_batch: Any, run: Any) -> None:
    slimmed = follow(tiny_graph, tiny_batch, {})
    assert slimmed.swept == ()
    batch = tiny_batch(2, 9, 2)
    assert torch.equal(run(slimmed.graph, **batch)[0], run(tiny_graph("llama")[1], **batch)[0])


@pytest.mark.parametrize(("method", "name"), [("magnitude", "value"), ("pca", "mlp")])
def test_a_width_that_the_method_does_not_cut(tiny_graph: Any, tiny_batch: Any, method: str, name: str) -> None:
    graph = tiny_graph("llama")[1]
    matches = find_regions(graph)
    region = next(r for r in matches.regions if name in r.name)
    options = Options(method=method, regions=("residual",))
    with pytest.raises(UsageError, match=rf"--plan cuts '{region.name}'.* --method {method} does not cut"):
        slim_graph(graph, matches, [tiny_batch(2, 8)], options, Progress(quiet=True), plan=WidthPlan({region.name: 4}))
