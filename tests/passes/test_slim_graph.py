"""Putting maps, sweep and passes together on small graphs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dotresize_fx.cost import count_cost
from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.journal import Journal
from dotresize_fx.options import Options
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.passes.sweep_regions import Slimmed
from dotresize_fx.progress import Progress
from dotresize_fx.width_plan import WidthPlan

QUIET = Progress(quiet=True)


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(16, 8, generator=generator)} for _ in range(count)]


def ffns_beside(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.head(x + m.down1(torch.relu(m.up1(x))) + m.down2(torch.relu(m.up2(x))))


def test_ffns_that_add_to_one_sum_are_one_sublayer(trace: Any, run: Any) -> None:
    parts = {"up1": nn.Linear(8, 32), "down1": nn.Linear(32, 8), "up2": nn.Linear(8, 32), "down2": nn.Linear(32, 8)}
    graph = trace(ffns_beside, (2, 8), **parts, head=nn.Linear(8, 3))
    options = Options(ratio=0.2, allocation="uniform")  # what is measured would be tokens of a language model
    slimmed = slim_graph(graph, find_regions(graph), batches(), options, QUIET)
    # 0.2 of 64 neurons, on a grid of 4.
    assert sorted(entry.region.width - entry.width for entry in slimmed.swept) == [4, 8]
    assert slimmed.notes == ()  # 18.75 % went, near enough
    assert run(slimmed.graph, x=torch.ones(3, 8))[0].isfinite().all()


@pytest.mark.parametrize(("multiple", "said"), [(16, True), (4, False)])
def test_a_grid_too_coarse_for_the_ratio_is_told(trace: Any, multiple: int, said: bool) -> None:
    parts = {"up1": nn.Linear(8, 32), "down1": nn.Linear(32, 8), "up2": nn.Linear(8, 32), "down2": nn.Linear(32, 8)}
    graph = trace(ffns_beside, (2, 8), **parts, head=nn.Linear(8, 3))
    options = Options(ratio=0.19, allocation="uniform", multiple=multiple)
    notes = slim_graph(graph, find_regions(graph), batches(), options, QUIET).notes
    told = "--ratio asked for 19.0% of the block weights and 25.0% went: widths go in steps"
    assert [note for note in notes if note.startswith(told)] == list(notes)
    assert bool(notes) == said


@pytest.mark.parametrize("regions", [("ffn",), ("residual",), ("ffn", "residual"), ("ffn", "attention")])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_a_quarter_goes(tiny_graph: Any, tiny_batch: Any, run: Any, kind: str, regions: tuple[str, ...]) -> None:
    _, dense = tiny_graph(kind)
    data = [tiny_batch(4, 24, 3, seed=seed) for seed in range(4)]
    options = Options(ratio=0.25, regions=regions, check=True)
    slimmed = slim_graph(dense, find_regions(dense), data, options, QUIET)
    before, after = (count_cost(graph, 16).block_linear_weights for graph in (dense, slimmed.graph))
    # One step of a tiny region's grid is up to a sixteenth of its width; a tied table under LayerNorm brings a
    # matrix behind the embedding.
    allowed = 0.08 if kind == "gpt2" or kind == "opt" else 0.04
    assert 1 - after / before == pytest.approx(0.25, abs=allowed)
    widths = {entry.region.name: entry.width for entry in slimmed.swept}
    assert all(slimmed.plan.widths[name] == width for name, width in widths.items())
    # All that was swept was cut, or refitted because scores or the stream were.
    cut = {entry.region.name for entry in slimmed.swept if entry.width < entry.region.width}
    assert {entry.method for entry in slimmed.swept if entry.region.name not in cut} <= {"refit", "kept"}
    assert {name for name, width in slimmed.plan.widths.items() if width < whole(dense)[name]} == cut
    assert run(slimmed.graph, **tiny_batch(2, 9, 2))[0].isfinite().all()


@pytest.mark.parametrize("method", ["auto", "pca", "magnitude"])
def test_readers_are_refitted_where_the_stream_alone_is_cut(tiny_graph: Any, tiny_batch: Any, method: str) -> None:
    """At their whole width, but for the baseline that refits nothing; the outputs come nearer to the dense model's."""
    _, dense = tiny_graph("llama")
    data = [tiny_batch(8, 32, seed=seed) for seed in range(9)]
    options = Options(ratio=0.1, regions=("residual",), method=method, check=True)
    slimmed = slim_graph(dense, find_regions(dense), data, options, QUIET)
    stream, *others = slimmed.swept
    assert stream.region.kind == "residual"
    kinds = [str(entry.region.kind) for entry in others]
    assert kinds == ([] if method == "magnitude" else ["value", "ffn"] * 2)
    assert all(entry.width == entry.region.width for entry in others)
    assert {entry.method for entry in others} <= {"refit", "kept"}
    if method == "magnitude":
        return
    assert "refit" in {entry.method for entry in others}
    alone = slim_graph(
        dense, find_regions(dense), data, options, QUIET, plan=WidthPlan({"residual stream": stream.width})
    )
    unseen = tiny_batch(8, 32, seed=99)
    expected, refitted, plain = (Execution(g).outputs(unseen)[0] for g in (dense, slimmed.graph, alone.graph))
    assert (refitted - expected).norm() < (plain - expected).norm()


def whole(graph: Any) -> dict[str, int]:
    return {region.name: region.width for region in find_regions(graph).regions}


def test_a_post_norm_stream_is_refused(tiny_graph: Any, tiny_batch: Any) -> None:
    _, dense = tiny_graph("bert")
    with pytest.raises(NothingToSlimError, match="post-norm"):
        slim_graph(dense, find_regions(dense), [tiny_batch(2, 8)], Options(regions=("residual",)), QUIET)


# -- what calibration may be like --------------------------------------------------------------------

HEADS_AND_FFN = Options(ratio=0.2, regions=("ffn", "attention"), check=True)


def constant(rows: int, length: int) -> Mapping[str, torch.Tensor]:
    """One token, all alone in every row: every Gram matrix has rank one."""
    mask = torch.zeros(rows, length, dtype=torch.int64)
    mask[:, 2] = 1
    return {"input_ids": torch.full((rows, length), 3), "attention_mask": mask}


@pytest.fixture
def poor(tiny_batch: Any) -> dict[str, list[Mapping[str, torch.Tensor]]]:
    """Calibration that says little, by what is wrong with it."""
    return {
        "three tokens": [tiny_batch(1, 3)],
        "one token a sequence": [tiny_batch(9, 1, seed=seed) for seed in range(9)],
        "activations that never change": [constant(2, 6)] * 9,
        "mostly padding": [tiny_batch(1, 12, padding=11, seed=seed) for seed in range(9)],
        "a batch of padding alone": [tiny_batch(1, 12, padding=12), tiny_batch(2, 12)],
    }


@pytest.mark.parametrize("kind", ["three tokens", "one token a sequence", "activations that never change"])
@pytest.mark.parametrize("model", ["llama", "opt"])
def test_calibration_that_says_little(
    tiny_graph: Any, tiny_batch: Any, run: Any, poor: Any, model: str, kind: str
) -> None:
    """Effort best does all that fast does, and repairs what came of it: no NaN would go away."""
    check_finite(tiny_graph(model)[1], poor[kind], run, tiny_batch(2, 9, 2), "best")


@pytest.mark.parametrize("kind", ["mostly padding", "a batch of padding alone"])
def test_padding_in_calibration(tiny_graph: Any, tiny_batch: Any, run: Any, poor: Any, kind: str) -> None:
    check_finite(tiny_graph("llama")[1], poor[kind], run, tiny_batch(2, 9, 2), "fast")


@pytest.mark.parametrize("dead", [1, 40, 64])
def test_dead_neurons_and_heads(tiny_graph: Any, tiny_batch: Any, run: Any, dead: int) -> None:
    """Neurons that never fire, and a value head that writes nothing."""
    graph = tiny_graph("llama")[1]
    matches = find_regions(graph)
    for region in matches.of_kind("ffn", "value"):
        writer = graph.op(region.writers[-1])
        weight = graph.weight(writer).detach().clone()
        weight[: dead if region.kind == "ffn" else dead // 8] = 0
        graph.set_weight(writer, weight)
    check_finite(graph, [tiny_batch(4, 24, 3, seed=seed) for seed in range(9)], run, tiny_batch(2, 9, 2), "fast")


def check_finite(graph: Any, data: Any, run: Any, unseen: Any, effort: str) -> None:
    options = dataclasses.replace(HEADS_AND_FFN, effort=effort, repair_steps=5)
    slimmed = slim_graph(graph, find_regions(graph), data, options, QUIET)
    assert any(entry.width < entry.region.width for entry in slimmed.swept)
    assert all(math.isfinite(loss) for loss in slimmed.plan.losses.values())
    assert all(tensor.isfinite().all() for tensor in slimmed.graph.program.state_dict.values())
    assert run(slimmed.graph, **unseen)[0].isfinite().all()


def test_a_run_gives_the_same_bytes_twice(tiny_graph: Any, tiny_batch: Any) -> None:
    graph = tiny_graph("llama")[1]
    data = [tiny_batch(4, 24, 3, seed=seed) for seed in range(9)]
    options = Options(ratio=0.3, effort="best", repair_steps=10)
    first, second = (slim_graph(graph, find_regions(graph), data, options, QUIET) for _ in range(2))
    assert first.plan == second.plan
    weights, others = first.graph.program.state_dict, second.graph.program.state_dict
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("allocation", ["measured", "uniform"])
def test_allocations(tiny_graph: Any, tiny_batch: Any, allocation: str) -> None:
    graph = tiny_graph("llama")[1]
    data = [tiny_batch(4, 24, 3, seed=seed) for seed in range(4)]
    options = Options(ratio=0.25, allocation=allocation)
    widths = slim_graph(graph, find_regions(graph), data, options, QUIET).plan.widths
    layers = [[widths[name] for name in widths if f"layers.{layer}." in name] for layer in (0, 1)]
    assert (layers[0] == layers[1]) == (allocation == "uniform")
    if allocation == "uniform":  # by whole heads nothing goes, by all else a quarter
        assert layers[0] == [2, 6, 6, 48]


def test_finished_sublayers_are_put_into_the_journal(tiny_graph: Any, tiny_batch: Any, tmp_path: Path) -> None:
    graph = tiny_graph("llama")[1]
    data = [tiny_batch(4, 24, 3, seed=seed) for seed in range(4)]
    plan = WidthPlan({"model.layers.0.self_attn value": 5, "model.layers.1.mlp": 40})
    journal = Journal(tmp_path / "journal", {})
    slimmed = slim_graph(graph, find_regions(graph), data, Options(), QUIET, journal, plan=plan)
    files = sorted((tmp_path / "journal").glob("*.safetensors"))
    assert len(files) == len(plan.widths) == journal.finished
    written = load_file(files[-1])
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == {
        "model.layers.1.mlp.gate_proj.weight": (40, 32),
        "model.layers.1.mlp.up_proj.weight": (40, 32),
        "model.layers.1.mlp.down_proj.weight": (32, 40),
    }
    assert all(torch.equal(tensor, slimmed.graph.program.state_dict[name]) for name, tensor in written.items())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mixtral", "bert"])
@pytest.mark.parametrize("effort", ["fast", "best"])
def test_a_run_goes_on_from_its_journal_to_the_same_bytes(
    tiny_graph: Any, tiny_batch: Any, tmp_path: Path, kind: str, effort: str
) -> None:
    """Stopped behind each sublayer in turn; what is finished is not solved for again."""
    graph = tiny_graph(kind)[1]
    data = [tiny_batch(4, 24, 3, seed=seed) for seed in range(4)]
    options = Options(ratio=0.25, effort=effort, repair_steps=3 if effort == "best" else None)
    task = "encoder" if kind == "bert" else "decoder"

    def run(journal: Journal, stop: int | None = None) -> Slimmed:
        count = 0

        def check() -> None:
            nonlocal count
            count = journal.finished
            if stop is not None and count > stop:
                raise KeyboardInterrupt

        torch.manual_seed(0)
        progress = Progress(quiet=True, check=check)
        return slim_graph(graph, find_regions(graph), data, options, progress, journal, task=task)

    whole = run(Journal(tmp_path / "whole", {"of": kind}))
    folder = tmp_path / "stopped"
    for stop in range(Journal(tmp_path / "whole", {"of": kind}).finished - 1):  # behind one more each time
        with pytest.raises(KeyboardInterrupt):
            run(Journal(folder, {"of": kind}), stop)
    resumed = run(Journal(folder, {"of": kind}))
    assert resumed.plan == whole.plan
    assert resumed.swept == whole.swept
    assert str(resumed.graph.program.graph_module.code) == str(whole.graph.program.graph_module.code)
    one, other = whole.graph.program.state_dict, resumed.graph.program.state_dict
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    # Another export's is not followed.
    assert Journal(folder, {"of": "another"}).finished == 0


@pytest.mark.parametrize("allocation", ["measured", "uniform"])
def test_a_refusal_names_the_ratio_as_it_was_asked_for(tiny_graph: Any, tiny_batch: Any, allocation: str) -> None:
    graph = tiny_graph("llama")[1]
    options = Options(ratio=0.9, allocation=allocation)  # 1 - (1 - 0.9) is another number
    with pytest.raises(NothingToSlimError, match=r"^--ratio 0\.9 would make a region vanish"):
        slim_graph(graph, find_regions(graph), [tiny_batch(2, 8)], options, QUIET)


def test_ratio_zero_changes_nothing(tiny_graph: Any, tiny_batch: Any, run: Any) -> None:
    graph = tiny_graph("llama")[1]
    slimmed = slim_graph(graph, find_regions(graph), [tiny_batch(2, 8)], Options(ratio=0), QUIET)
    assert slimmed.swept == ()
    assert slimmed.notes == ("ratio 0: nothing was cut",)
    batch = tiny_batch(2, 9, 2)
    assert torch.equal(run(slimmed.graph, **batch)[0], run(graph, **batch)[0])
