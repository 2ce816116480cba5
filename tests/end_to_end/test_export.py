"""The main job from outside: what OUT holds, what the terminal says, and that the same input gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

import dotresize_fx
from dotresize_fx.export.bench import bench
from dotresize_fx.workload import Workload

FILES = ["config.json", "model.onnx", "model.onnx.data", "plan.json", "report.html", "report.json"]
FILES += ["tokenizer.json", "tokenizer_config.json"]

Exported = Callable[[str], tuple[Path, Any]]


@pytest.mark.parametrize("kind", ["deep llama", "bert"])
def test_out_holds_everything(exported: Exported, model_folder: Callable[[str], Path], kind: str) -> None:
    out, ended = exported(kind)
    assert ended.code == 0, ended.stderr
    assert sorted(file.name for file in out.iterdir()) == FILES
    assert [entry.name for entry in out.parent.iterdir() if entry.name.startswith(".")] == []
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((model_folder(kind) / "config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("some text").input_ids == tokenizer_of(model_folder(kind))("some text").input_ids


def tokenizer_of(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["deep llama", "bert"])
def test_the_report_tells_what_is_there(exported: Exported, model_folder: Callable[[str], Path], kind: str) -> None:
    out, _ = exported(kind)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["schema_version"] == 3
    assert report["seed"] == 0
    seconds = report["stage_seconds"]
    assert next(iter(seconds)) == "start"
    assert sum(seconds.values()) - seconds["total"] <= seconds["total"]
    if kind == "deep llama":  # a process of its own, which imports everything
        assert seconds["start"] > 1
    assert report["options"]["ratio"] == 0.25
    assert {"python", "torch", "transformers", "onnx", "onnxruntime"} <= set(report["packages"])
    written = {file.name for file in out.iterdir()} - {"report.json", "report.html"}
    assert report["outputs_sha256"] == {name: sha256(out / name) for name in written}
    inputs = report["inputs_sha256"]
    for name in ("config.json", "model.safetensors"):
        assert inputs[name] == sha256(model_folder(kind) / name)
    assert len(inputs["calibration text"]) == len(inputs["evaluation text"]) == 64
    assert inputs["calibration text"] != inputs["evaluation text"]
    dense, slim = report["figures"]["dense"], report["figures"]["slim"]
    assert slim["file_bytes"] == sum((out / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    for figure in ("parameters", "block_linear_weights", "macs_per_token", "block_macs_per_token", "file_bytes"):
        assert slim[figure] < dense[figure], figure
    # The widths are on a grid of 8 here: one step of an FFN of 64 is 8 % of a layer's weights at most.
    layers = 1 if kind == "bert" else 2
    assert report["summary"]["block_weights_removed"] == pytest.approx(0.25, abs=0.08 / layers)
    assert report["summary"]["verified"] is True
    assert report["figures"]["verification"]["max_abs_difference"] <= 1e-3
    assert report["figures"]["verification"]["cases"] >= 3
    assert slim["latency"]["runs"] >= 5
    rows = {row["name"]: row for row in report["regions"]}
    assert [row["width_before"] for row in rows.values() if row["kind"] == "ffn"] == [64] * layers
    cut = {name: row for name, row in rows.items() if row["width_after"] < row["width_before"]}
    methods = {"ffn": {"obs", "dotresize"}, "kv_heads": {"kv-heads"}, "query_key": {"query-key"}}
    assert all(row["method"] in {"value": {"value-rank"}, **methods}[row["kind"]] for row in cut.values())
    assert all(row["method"] in (None, "refit", "kept") for name, row in rows.items() if name not in cut)
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    assert {name: row["width_after"] for name, row in rows.items() if name in plan["widths"]} == plan["widths"]
    assert set(cut) <= set(plan["widths"])
    assert plan["predicted_losses"].keys() == plan["widths"].keys()
    assert all(loss >= 0 for loss in plan["predicted_losses"].values())
    model = transformers.AutoModel.from_pretrained(model_folder(kind))
    weights = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {row["name"].removeprefix("model.") for row in report["linears"]} - {"lm_head"} == weights
    assert all(row["roles"] or row["reason"] for row in report["linears"])


@pytest.mark.parametrize("kind", ["deep llama", "bert"])
def test_the_reports_macs_are_those_that_bench_counts(exported: Exported, kind: str) -> None:
    """Of the same file. Per token they are a + b x length; the report's length is beyond these models' positions.

    The report counts a pooler for each token like any linear, a run has it once a sequence.
    """
    out, _ = exported(kind)
    figures = json.loads((out / "report.json").read_text(encoding="utf-8"))["figures"]
    pooler = 32 * 32 if kind == "bert" else 0
    lengths = (16, 48)
    done = bench([out], [Workload(prompt=length, decode=0, batch=2) for length in lengths], runs=1, threads=1)
    found = [workload.phases[0].runs[0].macs for workload in done.workloads]
    one, other = (macs / 2 - pooler for macs in found if macs is not None)
    slope = (other / lengths[1] - one / lengths[0]) / (lengths[1] - lengths[0])
    per_token = one / lengths[0] + slope * (figures["macs_length"] - lengths[0])
    assert per_token + pooler == pytest.approx(figures["slim"]["macs_per_token"])


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_fidelity_fits_the_task(exported: Exported) -> None:
    (decoder,) = json.loads((exported("deep llama")[0] / "report.json").read_text())["figures"]["fidelity"]
    assert decoder["tokens"] == 16 * 31
    assert decoder["dense_perplexity"] > 1
    assert decoder["slim_perplexity"] != decoder["dense_perplexity"]
    assert decoder["kl_to_dense"] > 0
    assert 0 < decoder["top1_agreement"] < 1
    (encoder,) = json.loads((exported("bert")[0] / "report.json").read_text())["figures"]["fidelity"]
    assert 0.5 < encoder["mean_cosine"] < 1
    assert encoder["count"] > 10


def test_the_page_opens_offline(exported: Exported) -> None:
    page = (exported("deep llama")[0] / "report.html").read_text(encoding="utf-8")
    assert "model.layers.0.mlp" in page
    assert "<svg" in page
    assert re.findall(r"https?://|//[a-z0-9.-]+\.[a-z]{2,}/|@import|<script[^>]+src", page) == []
    links = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'> ]+)", page)
    assert [link for link in links if not link.startswith(("#", "data:"))] == []


def test_the_terminal_shows_stages_and_one_table(exported: Exported) -> None:
    out, ended = exported("deep llama")
    told, plan = [], []
    for line in ended.stderr.splitlines():
        (plan if line.startswith(("width plan", "  ")) else told).append(line)
    stages = [re.match(r"(.+?) {2,}\d+\.\d s$", line) for line in told]
    assert all(stages), ended.stderr  # nothing of the libraries underneath gets through
    assert [stage[1] for stage in stages if stage] == [
        "load",
        "capture",
        "find regions",
        "measure sensitivity",
        "sweep",
        "convert slim to ONNX",
        "verify in ONNX Runtime",
        "measure fidelity",
        "convert dense to ONNX",
        "measure latency",
    ]
    widths = json.loads((out / "plan.json").read_text(encoding="utf-8"))["widths"]
    assert [line.split()[0] for line in plan] == ["width", "layer", "model.layers.0", "model.layers.1"]
    for line in plan[2:]:
        layer, *cells = line.split()
        width = widths[f"{layer}.mlp"]
        assert cells[:3] == ["64", "->", str(width)] if width < 64 else cells[:1] == ["64"]
    for figure in ("parameters", "block linear weights", "MACs per token", "file size", "perplexity", "top-1"):
        assert figure in ended.stdout
    for figure in ("KL to dense", "latency", "largest difference to slim program"):
        assert figure in ended.stdout
    assert str(out) in ended.stdout.splitlines()[-1]
    assert max(map(len, ended.stdout.splitlines()[:-1])) <= 100


@pytest.mark.parametrize("kind", ["deep llama", "bert"])
def test_the_onnx_runs_on_any_batch_and_length(exported: Exported, kind: str) -> None:
    """An opinion from outside: ONNX's checker and ONNX Runtime, with neither our session nor our program."""
    out, _ = exported(kind)
    onnx.checker.check_model(str(out / "model.onnx"))
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    sizes = {item.name: item.shape for item in session.get_inputs()}
    past = {name: shape for name, shape in sizes.items() if name.startswith("past_key_values.")}
    own = {"input_ids", "attention_mask"} | ({"position_ids"} if "llama" in kind else set())
    assert sizes.keys() - past.keys() == own
    assert len(past) == (4 if "llama" in kind else 0)
    assert json.loads((out / "report.json").read_text())["cache"] == bool(past)
    for rows, length in ((1, 1), (3, 7), (2, 64)):
        ids = np.random.default_rng(0).integers(0, 300, (rows, length))
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        given |= {"position_ids": np.broadcast_to(np.arange(length), ids.shape)} if past else {}
        given |= {name: np.zeros((rows, shape[1], 0, shape[3]), np.float32) for name, shape in past.items()}
        outputs = session.run(None, given)
        assert outputs[0].shape == (rows, length, 32 if kind == "bert" else 300)
        assert np.isfinite(outputs[0]).all()


def test_python_gives_the_same_bytes_as_the_command_line(
    exported: Exported, model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """The same input a second time: another process, another way in, the same bytes."""
    result = dotresize_fx.slim(
        model_folder("deep llama"),
        ratio=0.25,
        calibration=[text_file],
        calibration_tokens=2048,
        sequence_length=32,
        evaluation_tokens=512,
    )
    report = result.save(tmp_path / "out")
    assert report.figures.block_weights_removed == pytest.approx(0.25, abs=0.04)
    out, _ = exported("deep llama")
    for name in FILES:
        if not name.startswith("report"):
            assert sha256(tmp_path / "out" / name) == sha256(out / name), name
    before = json.loads((out / "report.json").read_text())
    assert report.to_json()["regions"] == before["regions"]


def test_a_second_export_needs_force_and_replaces_whole(
    tmp_path: Path,
    exported: Exported,
    model_folder: Callable[[str], Path],
    few_tokens: list[str],
    here: Callable[..., Any],
) -> None:
    """On GPT-2, both kinds of region, with pre- and postconditions on."""
    out = shutil.copytree(exported("bert")[0], tmp_path / "parent" / "out")
    command = [
        "export",
        model_folder("gpt2"),
        out,
        "--regions",
        "ffn,residual",
        "--no-cache",
        "--check",
        "--quiet",
        *few_tokens,
    ]
    (out / "left over").write_text("from an earlier version")
    assert here(*command).code == 8
    assert (out / "left over").exists()
    again = here(*command, "--force", "--seed", 1, "--ratio", 0.1)
    assert (again.code, again.stderr) == (0, "")
    assert sorted(file.name for file in out.iterdir()) == FILES
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]
    report = json.loads((out / "report.json").read_text())
    assert report["seed"] == 1
    assert report["cache"] is False
    assert [value.name for value in onnx.load(out / "model.onnx").graph.input] == ["input_ids", "attention_mask"]
    assert {region["kind"] for region in report["regions"] if region["method"]} == {"ffn", "residual"}
