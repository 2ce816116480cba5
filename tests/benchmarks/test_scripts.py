"""What the fidelity benchmarks are asked for, and how they split a cut over layers and rank it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dotresize_fx.compiler import analyse
from dotresize_fx.cost import count_cost, weights_per_unit
from dotresize_fx.export.model_source import load_model
from dotresize_fx.options import SELF_TOKENS
from dotresize_fx.progress import Progress
from dotresize_fx.regions import ATTENTION_KINDS, RegionKind

Script = Callable[[str], ModuleType]
Start = Callable[[str, str], str]


def test_all_rows_and_the_published_settings_are_the_default(script: Script) -> None:
    fidelity = script("fidelity")
    found = fidelity.parse(["--text-dir", "x"])
    assert found.rows == list(script("fidelity_rows").ROWS)
    assert (found.ratios, found.calibration_tokens, found.self_tokens) == ([0.2, 0.3, 0.5], 196_608, SELF_TOKENS)
    assert found.budget_minutes == math.inf
    with pytest.raises(SystemExit):
        fidelity.parse(["--text-dir", "x", "--rows", "nonesuch"])


def test_other_scripts_take_their_arguments(script: Script) -> None:
    assert script("sensitivity").parse(["--text-dir", "x", "--layers", "0", "2"]).layers == [0, 2]
    assert script("methods").parse(["--text-dir", "x"]).bases == ["shared", "sublayer"]
    with pytest.raises(SystemExit):
        script("methods").parse(["--text-dir", "x", "--methods", "obs"])


def test_the_last_fifth_of_a_source_is_measured(script: Script, text_dir: Path) -> None:
    texts = script("texts").read_texts(text_dir)
    assert (texts.same, texts.other) == (["calibration-a", "calibration-b"], ["heldout-c"])
    for name in texts.same:
        assert texts.calibrating[name] + texts.measured[name] == texts.whole[name]


def test_rank_correlation_knows_order_and_ties(script: Script) -> None:
    sensitivity = script("sensitivity")
    assert sensitivity.spearman([1.0, 20.0, 300.0], [0.1, 0.2, 0.9]) == pytest.approx(1)
    assert sensitivity.spearman([1.0, 2.0, 3.0], [9.0, 8.0, 7.0]) == pytest.approx(-1)
    assert sensitivity.ranks([5.0, 1.0, 5.0]) == [1.5, 0.0, 1.5]
    assert math.isnan(sensitivity.spearman([1.0], [1.0]))


def test_shares_follow_wishes_within_their_limits(
    script: Script, save_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    allocations = script("allocations")
    sizes: dict[str, Any] = {"num_hidden_layers": 3, "intermediate_size": 256}
    loaded = load_model(str(save_tiny_model(tmp_path / "model", **sizes)))
    _, graph, matches = analyse(loaded, Progress(quiet=True))
    regions = allocations.cuttable(graph, matches, (RegionKind.FFN, *ATTENTION_KINDS))
    assert {region.kind for region in regions} == {RegionKind.FFN, RegionKind.VALUE, RegionKind.QUERY_KEY}
    ffns = [region for region in regions if region.kind is RegionKind.FFN]
    wishes = dict(zip([region.name for region in ffns], [1.0, 2.0, 1000.0], strict=True))
    plan = allocations.plan_by_shares(graph, ffns, wishes, 0.4, least=0.03, most=0.75)
    shares = [1 - plan.widths[region.name] / region.width for region in ffns]
    assert shares[0] < shares[1] < shares[2] == pytest.approx(0.75)
    removed = sum((r.width - plan.widths[r.name]) * weights_per_unit(graph, r) for r in ffns)
    assert removed / count_cost(graph, 1).block_linear_weights == pytest.approx(0.4, abs=0.02)
    with pytest.raises(ValueError, match="cannot remove"):
        allocations.plan_by_shares(graph, ffns, wishes, 0.9, most=0.75)


def test_a_run_prints_and_records_its_rows(
    script: Script, start: Start, save_tiny_model: Callable[..., Path], text_dir: Path, tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model", num_hidden_layers=2, intermediate_size=128)
    rows = ["modegpt", "obs-uniform", "block-influence", "trial-closed", "heal"]
    given = f"--model {model} --text-dir {text_dir} --json {tmp_path / 'out.jsonl'} --rows {' '.join(rows)}"
    given += " --ratios 0.2 --length 16 --calibration-tokens 320 --tokens-per-text 64 --device cpu"
    given += " --self-tokens 64 --heal-minutes 0.01 --repair-steps 2"
    given += f" --self-file {tmp_path / 'build' / 'own.safetensors'}"
    printed = start("fidelity", given)
    entries = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [entry["kind"] for entry in entries] == ["run", *["row"] * len(rows)], entries
    assert [entry["method"] for entry in entries[1:]] == rows
    assert all(entry["weights_off"] == pytest.approx(0.2, abs=0.04) for entry in entries[1:])
    assert {"best", "sample", "heal"} == set(entries[-1]["parts"])
    assert entries[1]["widths"] is None
    assert all(sum(entry["widths"].values()) > 0 for entry in entries[2:])
    assert len(entries[2]["widths"]) == 2
    assert "| 20% | obs-uniform |" in printed
    bench = script("fidelity_rows").Bench(script("fidelity").parse(given.split()))
    ids, seconds = bench.own_text(4)
    assert ids.shape == (4, 16)
    assert seconds == entries[-1]["parts"]["sample"]


def test_the_other_scripts_run(
    start: Start, save_tiny_model: Callable[..., Path], text_dir: Path, tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model", num_hidden_layers=2, intermediate_size=128)
    given = f"--model {model} --text-dir {text_dir} --length 16 --calibration-tokens 192 --tokens-per-text 32"
    given += " --device cpu"
    file = tmp_path / "methods.jsonl"
    cut = f"--width 24 --methods pca --efforts published fast --json {file}"
    assert "| 24 | pca | sublayer | fast |" in start("methods", f"{given} {cut}")
    rows = [json.loads(text) for text in file.read_text().splitlines()][1:]
    assert [(row["basis"], row["effort"]) for row in rows] == [
        (basis, effort) for effort in ("published", "fast") for basis in ("shared", "sublayer")
    ]
    assert rows[0]["parameters"] < rows[1]["parameters"]
    assert [len(row["regions"]) for row in rows] == [1, 1, 5, 5]
    assert "| all | 3 |" in start("sensitivity", f"{given} --layers 0 --solve-tokens 96")
    given = f"{model} --text {text_dir / 'calibration-a.txt'} --tokens 256 --length 16 --share 0.5 --device cpu"
    printed = start("repair_tokens", f"{given} --layers 0 1 --steps 2 3 --at-once 2 1")
    assert [row.count(" | ") for row in printed.splitlines()[-8:]] == [5] * 8
    assert "| 1 | 16 | 3 |" in printed
