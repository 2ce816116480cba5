"""Several processes heal together: OUT is as one's, one of them speaks, and none outlives another's failure."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import dotresize_fx
from dotresize_fx.export.onnx_session import OnnxModel
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.launched import Launched

HEAL = ["--ratio", "0.25", "--effort", "heal", "--repair-steps", "5", "--self-tokens", "256"]
QUICK = ["--regions", "ffn", "--allocation", "uniform"]
Start = Callable[..., "subprocess.Popen[str]"]


def test_two_ranks_write_what_one_process_finds(
    tmp_path: Path, model_folder: Callable[[str], Path], text_file: Path, few_tokens: list[str], cli: Callable[..., Any]
) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dotresize_fx")
    command = ["export", model_folder("llama"), out := tmp_path / "out", *HEAL, *few_tokens, "--heal-steps", "20"]
    together = cli(*command, cwd=tmp_path, python=torchrun)
    assert together.code == 0, together.stderr
    stages = re.findall("^(load|sweep|heal|measure latency) +[0-9]", together.stderr, re.MULTILINE)
    assert stages == ["load", "sweep", "heal", "measure latency"]  # once each
    assert together.stdout.count("\nwrote ") == 1
    assert "Warning" not in together.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    found = json.loads((out / "report.json").read_text())
    assert found["summary"]["verified"] is True
    alone = dotresize_fx.slim(
        model_folder("llama"),
        0.25,
        calibration=text_file,
        effort="heal",
        repair_steps=5,
        self_tokens=256,
        heal_steps=20,
        calibration_tokens=2048,
        sequence_length=32,
        evaluation_tokens=512,
    )
    assert json.loads((out / "plan.json").read_text())["widths"] == dict(alone.slimmed.plan.widths)
    (processes, *both), (none, before, after) = healed(found["notes"]), healed(alone.notes)
    assert (processes, none) == (" in 2 processes", "")
    assert after < before - 1e-3
    assert both == pytest.approx([before, after], abs=2e-4)
    ids = torch.arange(2 * 60).view(2, 60)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    (expected,) = Execution(alone.slim).outputs(inputs)
    model = OnnxModel(out / "model.onnx")
    logits, *_ = model(model.at_start({name: value.numpy() for name, value in inputs.items()}))
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


SHARES = """
import json, sys
import torch
import dotresize_fx
from dotresize_fx.fx_form.execution import Execution
result = dotresize_fx.slim(
    sys.argv[1], 0.3, calibration=sys.argv[2], calibration_tokens=int(sys.argv[3]), sequence_length=32,
    evaluation_tokens=64, seed=0,
)
ids = torch.arange(2 * 30).view(2, 30)
outputs = Execution(result.slim).outputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0]
errors = {one.region.name: one.error for one in result.swept}
plan = result.slimmed.plan
torch.save([dict(plan.widths), dict(plan.losses), errors, outputs, result.notes], sys.argv[4])
"""


@pytest.mark.parametrize(("kind", "processes", "tokens"), [("llama", 3, 1000), ("mixtral", 2, 512)])
def test_ranks_that_share_the_text_find_what_one_does(
    tmp_path: Path, model_folder: Callable[[str], Path], text_file: Path, kind: str, processes: int, tokens: int
) -> None:
    """Text that does not divide evenly, and experts."""
    (script := tmp_path / "shares.py").write_text(SHARES)
    found = []
    for count in (1, processes):
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
        given = [model_folder(kind), text_file, tokens, tmp_path / f"{count}.pt"]
        command = [sys.executable, *start, str(script), *map(str, given)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        found.append(torch.load(given[-1]))
    (widths, losses, errors, outputs, _), (other_widths, other_losses, other_errors, other_outputs, notes) = found
    assert f"{processes} processes shared the calibration" in notes
    assert other_widths == widths
    # Sums in another order, of which small differences of large ones are taken.
    assert other_losses == pytest.approx(losses, rel=1e-3, abs=1e-9)
    for name, error in errors.items():
        assert other_errors[name] == pytest.approx(error, rel=1e-4), name
    assert float((other_outputs - outputs).abs().max()) < 1e-3 * float(outputs.abs().max())


HEALS = """
import json, sys
import dotresize_fx
result = dotresize_fx.slim(
    sys.argv[1], 0.25, calibration=sys.argv[2], effort="heal", repair_steps=5, self_tokens=256, heal_steps=20,
    calibration_tokens=2048, sequence_length=32, evaluation_tokens=512, device="cuda",
)
print(json.dumps({"widths": dict(result.slimmed.plan.widths), "notes": result.notes}))
"""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cards_heal_as_one_does(tmp_path: Path, model_folder: Callable[[str], Path], text_file: Path) -> None:
    """Through NCCL."""
    script = tmp_path / "heals.py"
    script.write_text(HEALS)
    found = []
    for start in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        command = [sys.executable, *start, str(script), str(model_folder("llama")), str(text_file)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        found.append(json.loads(run.stdout.splitlines()[-1]))
    alone, together = found
    assert together["widths"] == alone["widths"]
    (none, *expected), (processes, *both) = healed(alone["notes"]), healed(together["notes"])
    assert (none, processes) == ("", " in 2 processes")
    # Sums over cards in another order, in bfloat16.
    assert both == pytest.approx(expected, abs=2e-3)


def healed(notes: Sequence[str]) -> tuple[str, float, float]:
    """(in how many processes, where there were several; held-out divergence before; after), as a run's notes say."""
    (note,) = [note for note in notes if note.startswith("healed")]
    found = re.match(r"healed for 20 steps in \d+ s(.*): held-out divergence ([\d.]+) -> ([\d.]+);", note)
    assert found, note
    return found[1], float(found[2]), float(found[3])


# -- without a launcher that would end the others ---------------------------------------------------


@pytest.fixture
def start_both(start: Start, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[subprocess.Popen[str]]]:
    """``start_both(*arguments, cwd, python=...)``: ranks 0 and 1 of two."""

    def begin(*arguments: object, **where: Any) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        runs = []
        for rank in ("0", "1"):
            for name, value in {**address, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}.items():
                monkeypatch.setenv(name, value)
            runs.append(start(*arguments, **where))
        return runs

    return begin


def ended(runs: list[subprocess.Popen[str]]) -> list[tuple[int, str, list[str]]]:
    """(exit code, standard output, what the command said of itself) of each."""
    try:
        found = [(*run.communicate(timeout=120), run.returncode) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert all("Traceback" not in err for _, err, _ in found), found
    return [(code, out, [s for s in err.splitlines() if s.startswith("dotresize-fx")]) for out, err, code in found]


FAILS = """
import os, sys
from dotresize_fx import cli
from dotresize_fx.healing.captured_step import EagerStep

def compute(step, data):
    if os.environ["RANK"] == "1":
        {how}
    step.ranks.sum(step.trained)

EagerStep.compute = compute
cli.main(sys.argv[1:])
"""


def test_a_rank_that_fails_while_healing(
    tmp_path: Path,
    save_tiny_model: Callable[..., Path],
    few_tokens: list[str],
    start_both: Callable[..., list[subprocess.Popen[str]]],
    tree: Callable[[Path], dict[str, str]],
) -> None:
    script = FAILS.format(how="raise ValueError('no memory left')")
    command = ["export", save_tiny_model(tmp_path / "model"), tmp_path / "out", *HEAL, *QUICK, *few_tokens]
    before = tree(tmp_path)
    first, second = ended(start_both(*command, cwd=tmp_path, python=("-c", script)))
    assert first == (13, "", [])
    assert second == (13, "", ["dotresize-fx: rank 1: ValueError: no memory left"])
    assert tree(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="signals of another kind")
def test_ctrl_c_while_healing(
    tmp_path: Path,
    save_tiny_model: Callable[..., Path],
    few_tokens: list[str],
    start_both: Callable[..., list[subprocess.Popen[str]]],
    tree: Callable[[Path], dict[str, str]],
) -> None:
    """Also where one rank waits for the other in a collective, as the first one does here."""
    script = FAILS.format(how="import time; print('here', flush=True); time.sleep(100)")
    command = ["export", save_tiny_model(tmp_path / "model"), tmp_path / "out", *HEAL, *QUICK, *few_tokens]
    before = tree(tmp_path)
    runs = start_both(*command, cwd=tmp_path, python=("-c", script))
    assert runs[1].stdout is not None
    runs[1].stdout.readline()
    time.sleep(0.5)
    for run in runs:
        run.send_signal(signal.SIGINT)
    first, second = ended(runs)
    assert first == (130, "", ["dotresize-fx: interrupted; nothing half-written was left behind"])
    assert second == (130, "", [])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", [["inspect"], ["export", "--effort", "best"]])
def test_what_needs_one_process_runs_in_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    here: Callable[..., Any],
    model_folder: Callable[[str], Path],
    command: list[str],
) -> None:
    """The others leave at once; the first one says so and goes on, here to what is wrong with its model."""
    monkeypatch.setattr(Launched, "others_left", False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = [tmp_path / "out"] if command[0] == "export" else []
    said = "2 processes were started and this is work for one: the others leave\n"
    for rank, code, start in (("1", 0, ""), ("0", 3, said)):
        monkeypatch.setenv("RANK", rank)
        found = here(command[0], tmp_path / "none", *out, *command[1:])
        assert (found.code, found.stdout) == (code, "")
        assert found.stderr.startswith(start) if start else found.stderr == ""
