"""The command line's own part: what it parses and prints, and which exit codes it knows. The rest is end_to_end/."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import dotresize_fx.errors
from dotresize_fx.cli import _parser, main
from dotresize_fx.errors import HUNG_UP, INTERRUPTED, TERMINATED, DotresizeError
from dotresize_fx.options import CALIBRATION_TOKENS, PLANNED, REPAIR_STEPS, Options
from dotresize_fx.width_plan import MULTIPLE, STEPS_AT_LEAST, grid


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"dotresize-fx {version('dotresize-fx')}\n"


@pytest.mark.parametrize("command", [[], ["export"], ["inspect"], ["eval"], ["generate"], ["bench"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command, "--help") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "usage: dotresize-fx" in captured.out
    for word in {
        "export": ("--ratio", "--force"),
        "eval": ("--text",),
        "inspect": ("MODEL",),
        "generate": ("PROMPT", "--max-tokens"),
        "bench": ("--workload", "--html"),
    }.get(command[0] if command else "", ("export", "inspect", "eval", "generate", "bench")):
        assert word in captured.out


def test_a_mistake_is_one_line_and_names_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", "model", "out", "--ratio", "a lot") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "dotresize-fx: argument --ratio: invalid float value: 'a lot' (see `dotresize-fx export --help`)\n"
    )


def test_the_defaults_are_those_of_python() -> None:
    parsed = _parser().parse_args(["export", "model", "out"])
    for field in dataclasses.fields(Options):
        if hasattr(parsed, field.name) and field.name not in (*PLANNED, "calibration", "calibration_data"):
            assert getattr(parsed, field.name) == getattr(Options(), field.name), field.name
    # Beside a plan it matters whether they were given at all.
    assert [getattr(parsed, name) for name in PLANNED] == [None] * len(PLANNED)
    assert (parsed.calibration, Options().calibration) == ([], ())


def test_the_help_states_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    run("export", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert f"({MULTIPLE}, finer below {MULTIPLE * STEPS_AT_LEAST}: {grid(64)} for heads of 64)" in text
    names = ["ratio", "cost", "method", "effort", "allocation", "head_sizes", "sequence_length", "evaluation_tokens"]
    defaults = {name: str(getattr(Options(), name)) for name in [*names, "device"]}
    for name, of_task in (("calibration_tokens", CALIBRATION_TOKENS), ("repair_steps", REPAIR_STEPS)):
        defaults[name] = f"{of_task['decoder']}; {of_task['encoder']} for an encoder"
    for name, default in defaults.items():
        described = re.split(rf" --{name.replace('_', '-')} (?=[A-Z])", text)[-1].partition(" --")[0]
        assert described.endswith(f"({default})"), name


def test_every_kind_of_error_has_an_exit_code_of_its_own() -> None:
    kinds = [
        kind
        for _, kind in inspect.getmembers(dotresize_fx.errors, inspect.isclass)
        if DotresizeError in kind.__bases__  # what is a special case of another kind has that one's code
    ]
    codes = [kind.exit_code for kind in kinds] + [0, DotresizeError.exit_code, INTERRUPTED, TERMINATED, HUNG_UP]
    assert len(kinds) >= 11
    assert len(set(codes)) == len(codes)
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    assert [128 + number for number in signals] == [INTERRUPTED, TERMINATED, HUNG_UP]


def test_help_and_mistakes_need_no_torch(tmp_path: Path) -> None:
    script = "import sys, atexit; from dotresize_fx.cli import main\n"
    script += "atexit.register(lambda: print({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
    script += "main(sys.argv[1:])"
    command = [sys.executable, "-P", "-c", script]
    helped = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (helped.returncode, helped.stderr) == (0, "")
    assert helped.stdout.endswith("set()\n")
    refused = subprocess.run([*command, "export"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "set()\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_finds_no_room(tmp_path: Path) -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "dotresize_fx", "--help"],
            cwd=tmp_path,
            env=buffered,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.returncode == 8
    assert ended.stderr == "dotresize-fx: the disk is full: free some space and run again\n"
