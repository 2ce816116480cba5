"""The ablation of optimal transport: what its formulations do to small regions, its run and its table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.region_map import selection
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.rotary_coherence import coherence

Script = Callable[[str], ModuleType]
Start = Callable[[str, str], str]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ffn(width: int) -> Region:
    return Region("f", RegionKind.FFN, Symmetry.PERMUTATION, width, ("g", "u"), ("r",), linear_branch=("u",))


def ffn_statistics(x: torch.Tensor) -> RegionStatistics:
    n, entered = x.shape[1], normal(99, 7, seed=1)
    writers = {name: normal(n, 7, seed=i) for i, name in enumerate("gu", 2)}
    weight = normal(5, n, seed=4)
    return RegionStatistics(len(x), x.T @ x / len(x), weight, entered.T @ entered / 99, writers)


def pairs(heads: int, width: int) -> Region:
    kinds: dict[str, Any] = {"kind": RegionKind.QUERY_KEY, "symmetry": Symmetry.ROTARY_PAIRS}
    return Region("p", width=width, writers=("q", "k"), readers=(), key_writers=("k",), heads=heads, **kinds)


def pair_statistics(angles: list[float]) -> RegionStatistics:
    n, inputs = 2 * len(angles), torch.cat([normal(50, 6), torch.zeros(50, 1)], 1)
    turned = torch.arange(16)[:, None] * torch.tensor(angles, dtype=torch.float64)
    near = coherence(torch.polar(torch.ones_like(turned), turned), torch.ones(16, 16, dtype=torch.bool).tril())
    writers = {"q": normal(n, 7, seed=1), "k": normal(n, 7, seed=2)}
    return RegionStatistics(50, torch.zeros(0), None, inputs.T @ inputs / 50, writers, coherence=near)


# -- members ---------------------------------------------------------------------------------------


def test_every_formulation_compares_two_members_that_cut_the_same(script: Script) -> None:
    found = script("ot_formulations")
    assert len(found.FORMULATIONS) >= 5
    for pair in found.FORMULATIONS.values():
        assert found.MEMBERS[pair.transport].kind is found.MEMBERS[pair.without].kind
        assert pair.transport != pair.without


@pytest.mark.parametrize("member", ["obs", "merged", "norm", "semi-relaxed", "recentred"])
def test_members_for_an_ffn_keep_neurons_and_at_full_width_all(script: Script, member: str) -> None:
    found = ffn_statistics(normal(60, 12))
    for _, solver in script("ot_formulations").MEMBERS[member].solvers:
        whole = solver(ffn(12), found, 12)
        assert torch.equal(whole.down, torch.eye(12, dtype=torch.float64))
        assert whole.branch_down is None or torch.equal(whole.branch_down, whole.down)
        cut = solver(ffn(12), found, 8)
        assert cut.down.shape == (12, 8)
        assert cut.down.isfinite().all()
        assert len(set(cut.down.argmax(0).tolist())) == 8


def test_a_free_plan_keeps_one_of_each_set_of_twins(script: Script) -> None:
    x = normal(80, 4)
    x = torch.cat([x, 2 * x, -x], 1)
    weight = torch.eye(12, dtype=torch.float64)
    down = script("ot_formulations").solve_semi_relaxed(ffn(12), RegionStatistics(80, x.T @ x / 80, weight), 4).down
    assert sorted(i % 4 for i in down.argmax(0).tolist()) == [0, 1, 2, 3]


def test_silent_neurons_are_no_obstacle(script: Script) -> None:
    x = normal(60, 12)
    x[:, :6] = 0
    for silent in (x, 0 * x):
        for member in ("semi-relaxed", "recentred", "norm"):
            for _, solver in script("ot_formulations").MEMBERS[member].solvers:
                cut = solver(ffn(12), ffn_statistics(silent), 8)
                assert cut.down.isfinite().all()
                assert cut.branch_down is None or cut.branch_down.isfinite().all()


def test_recentring_moves_only_the_linear_branch_of_kept_neurons(script: Script) -> None:
    found = ffn_statistics(normal(60, 12))
    half, whole = (script("ot_formulations").solve_recentred(ffn(12), found, 8, share) for share in (0.5, 1.0))
    assert torch.equal(half.down, selection(half.down.argmax(0), 12))
    assert torch.equal(half.branch_down[half.down.argmax(0)], torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(2 * (half.branch_down - half.down), whole.branch_down - whole.down)
    assert not torch.equal(whole.branch_down, whole.down)


@pytest.mark.parametrize("choices", [{}, {"choose": True}, {"transport": False}])
def test_pairs_of_one_angle_that_say_the_same_merge_without_loss(script: Script, choices: dict[str, bool]) -> None:
    found = pair_statistics([1.0, 0.5, 0.5])
    query = found.writer_weights["q"]
    query[[2, 5]] = 0.5 * query[[1, 4]]  # a multiple of pair 1, with other keys
    merged = script("ot_heads").solve_pairs(pairs(1, 6), found, 4, **choices)
    assert merged.pairs.tolist() in ([0, 1], [0, 2])
    assert float(merged.notes["scores lost"]) < 1e-6
    whole = script("ot_heads").solve_pairs(pairs(1, 6), found, 6, **choices)
    assert torch.equal(whole.down, torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("member", ["pairs dropped", "pairs merged", "pairs transported", "pairs merged with nearest"])
def test_members_for_pairs_keep_as_many(script: Script, member: str) -> None:
    found = pair_statistics([1.0, 0.9, 0.3, 0.2])
    for _, solver in script("ot_formulations").MEMBERS[member].solvers:
        cut = solver(pairs(1, 8), found, 4)
        assert len(set(cut.pairs.tolist())) == 2
        assert cut.down.shape[-2:] == (8, 4)
        assert cut.down.isfinite().all()
        assert (cut.key_down is None) == (member == "pairs dropped")


def test_a_twin_head_hands_its_values_over(script: Script) -> None:
    region = Region("h", RegionKind.HEADS, Symmetry.PERMUTATION, 3, ("v",), ("r",), heads=3, attention="a")
    x = normal(80, 6)
    x[:, 4:6] = 0.1 * x[:, 2:4]  # head 2 attends as head 1 does
    written = normal(6, 9, seed=3)
    found = RegionStatistics(80, x.T @ x / 80, normal(8, 6, seed=4), None, {"v": written})
    mixed = script("ot_heads").mix_values(region, found, 2, ("v",))["v"]
    gone = next(i for i in range(3) if float(mixed[2 * i : 2 * i + 2].abs().max()) == 0)
    assert gone in (1, 2)
    heir = 3 - gone
    moved = (mixed - written)[2 * heir : 2 * heir + 2]
    assert float(moved.norm()) > float((mixed - written)[:2].norm())
    assert script("ot_heads").mix_values(region, found, 3, ("v",)) == {}


# -- the script ------------------------------------------------------------------------------------


def test_a_run_measures_both_members_of_every_pair(
    script: Script, start: Start, save_tiny_model: Callable[..., Path], text_dir: Path, tmp_path: Path
) -> None:
    sizes = {"intermediate_size": 128, "attention_bias": True}
    model = save_tiny_model(tmp_path / "model", **sizes)
    file = tmp_path / "out.jsonl"
    given = f"--model {model} --text-dir {text_dir} --json {file} --seeds 3 --ratios 0.3 --repair-steps 2"
    asked = ["recentre", "heads", "pairs-chosen", "stream"]
    given += f" --efforts best --formulations {' '.join(asked)}"
    given += " --length 16 --calibration-tokens 320 --tokens-per-text 64 --device cpu"
    start("ot_ablation", given)
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    rows = entries[1:]
    assert [entry["kind"] for entry in entries] == ["run", *["row"] * len(rows)], entries
    pairs = {name: script("ot_formulations").FORMULATIONS[name] for name in asked}
    members = dict.fromkeys(name for pair in pairs.values() for name in (pair.transport, pair.without))
    assert [(row["effort"], row["member"]) for row in rows] == [("best", name) for name in members]
    assert all(row["weights_off"] > 0.02 and row["seed"] == 3 for row in rows)
    of_member = {row["member"]: row for row in rows}
    for pair in pairs.values():
        assert of_member[pair.transport]["widths"] == of_member[pair.without]["widths"]
        assert of_member[pair.transport]["weights_off"] == of_member[pair.without]["weights_off"]
    printed = start("ot_ablation", f"--table {file}")
    assert all(f"| {name} | 30% | best | 1 |" in printed for name in pairs)


def test_the_table_pairs_seeds_and_marks_what_is_beyond_the_spread(script: Script) -> None:
    table = script("ot_table").table

    def row(member: str, seed: int, excess: float, kl: float) -> dict[str, Any]:
        figures = {"excess": excess, "kl": kl, "other": kl, "weights_off": 0.2}
        return {"member": member, "ratio": 0.2, "effort": "fast", "seed": seed, **figures}

    rows = [row("merged", 0, 0.1, 0.4), row("obs", 0, 0.2, 0.2), row("merged", 1, 0.3, 0.1), row("obs", 1, 0.41, 0.2)]
    [cells] = table([*rows, row("obs", 2, 9.0, 9.0)])
    assert cells[:5] == ["merge", "20%", "fast", "2", "20.0%"]
    assert cells[5:8] == ["0.2000 +- 0.1414", "0.3050 +- 0.1485", "**-0.1050 +- 0.0071**"]
    assert cells[10] == "+0.0500 +- 0.2121"


def test_what_the_script_asks_for(script: Script) -> None:
    ablation = script("ot_ablation")
    found = ablation.parse(["--text-dir", "x"])
    assert (found.ratios, found.seeds, found.efforts) == ([0.2, 0.3, 0.5], [0, 1, 2], ["fast", "best"])
    for wrong in ([], ["--text-dir", "x", "--formulations", "nonesuch"]):
        with pytest.raises(SystemExit):
            ablation.parse(wrong)


def test_a_seed_samples_calibration_text(script: Script, text_dir: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    texts, tokenizer = script("texts"), tiny_tokenizer(tmp_path)
    shape: dict[str, Any] = {"length": 16, "tokens": 320, "rows": 2, "device": "cpu"}
    samples = [
        torch.cat([b["input_ids"] for b in texts.calibration(texts.read_texts(text_dir), tokenizer, seed=s, **shape)])
        for s in (None, 0, 0, 1)
    ]
    assert all(one.shape == samples[0].shape for one in samples)
    assert torch.equal(samples[1], samples[2])
    assert not any(torch.equal(samples[i], samples[3]) for i in (0, 1))
