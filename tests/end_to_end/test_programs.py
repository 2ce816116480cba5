"""A hand-written GPT as a user has it: slimmed in memory, and from a file by the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dotresize_fx
from dotresize_fx.export.onnx_session import OnnxModel
from dotresize_fx.passes.prove_exactness import redraw_parameters

VOCABULARY, LONGEST = 97, 24


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        parts = self.qkv(self.before(x)).split(width, dim=2)
        q, k, v = (part.view(rows, length, self.heads, -1).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class Gpt(nn.Module):
    """Packed qkv, learned positions, a tied head."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(LONGEST, width)
        self.blocks = nn.ModuleList([Block(width, 4)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def draw(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def gpt() -> nn.Module:
    return redraw_parameters(Gpt()).eval()


@pytest.fixture(scope="module")
def saved(gpt: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GPT as ``model.pt2``, free in batch and length, and ``inputs.npz`` beside it."""
    folder = tmp_path_factory.mktemp("program")
    free = torch.export.Dim.AUTO
    program = torch.export.export(gpt, (draw(2, 12),), dynamic_shapes=({0: free, 1: free},))
    torch.export.save(program, folder / "model.pt2")
    np.savez(folder / "inputs.npz", idx=draw(40, 12, 1).numpy())
    return folder / "model.pt2"


def test_a_module_in_memory(gpt: nn.Module, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in gpt.state_dict().items()}
    batches = (draw(3, 10, seed) for seed in range(1, 13))
    result = dotresize_fx.slim(gpt, 0.2, example_inputs=draw(2, 12), calibration=batches)
    report = result.save(tmp_path / "out").to_json()
    assert all(torch.equal(value, before[key]) for key, value in gpt.state_dict().items())
    assert report["summary"]["verified"]
    assert report["summary"]["block_weights_removed"] == pytest.approx(0.2, abs=0.06)  # widths come in steps
    assert report["model"] == {"name": "Gpt", "description": "module Gpt, as it was in memory", "task": "logits"}
    (fidelity,) = report["figures"]["fidelity"]
    # 36 samples, of which the last 7 measure: 9 predicted tokens each.
    assert fidelity["tokens"] == 63
    assert fidelity["dense_perplexity"] > 1
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "model.onnx",
        "model.onnx.data",
        "plan.json",
        "report.html",
        "report.json",
    ]
    assert "sequence_length" not in report["options"]
    logits = OnnxModel(tmp_path / "out" / "model.onnx")({"idx": draw(1, 5, 9).numpy()})[0]
    assert logits.shape == (1, 5, VOCABULARY)


def test_a_saved_program_by_the_command_line(saved: Path, here: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = saved.with_name("inputs.npz")
    ended = here("export", saved, out, "--ratio", "0.2", "--calibration-data", data, "--quiet")
    assert ended.code == 0, ended.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["model"]["name"] == "model.pt2"
    assert report["inputs_sha256"].keys() == {"model.pt2", "calibration data", "evaluation data"}
    assert report["summary"]["verified"]
    ended = here("eval", out, "--text", __file__.replace(".py", ".txt"), "--quiet")
    assert ended.code == 7  # the text comes first
    (tmp_path / "text.txt").write_text("some text")
    ended = here("eval", out, "--text", tmp_path / "text.txt", "--quiet")
    assert (ended.code, "reads no text" in ended.stderr) == (2, True)


def test_a_saved_program_is_inspected(saved: Path, here: Callable[..., Any]) -> None:
    ended = here("inspect", saved, "--quiet")
    assert ended.code == 0, ended.stderr
    for name in ("residual stream", "blocks.0 value", "blocks.0 query_key", "blocks.0: ffn width 128"):
        assert name in ended.stdout


def test_a_program_is_cut_like_the_module_it_was_made_of(gpt: nn.Module, saved: Path) -> None:
    data = [draw(40, 12, 1)]
    module = dotresize_fx.slim(gpt, 0.2, example_inputs=draw(2, 12), calibration=data)
    program = dotresize_fx.slim(torch.export.load(str(saved)), 0.2, calibration=data)
    file = dotresize_fx.slim(saved, 0.2, calibration=saved.with_name("inputs.npz"))
    widths = [{entry.region.name: entry.width for entry in result.swept} for result in (module, program, file)]
    assert widths[0] == widths[1] == widths[2]


# -- mistakes --------------------------------------------------------------------------------------


@pytest.fixture
def refused(saved: Path, here: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """``refused(code, *options, model=None)``: an export that must say one line."""

    def run(code: int, *options: object, model: object = None) -> str:
        ended = here("export", model or saved, tmp_path / "out", "--quiet", *options)
        assert ended.code == code, ended.stderr
        assert ended.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return str(ended.stderr)

    return run


def test_calibration_that_is_none(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "a module or a program calibrates on inputs of its own: give --calibration-data" in refused(2)
    (tmp_path / "text.txt").write_text("text")
    assert "--calibration is text" in refused(2, "--calibration", tmp_path / "text.txt")
    assert "--calibration-data is for modules and programs" in refused(
        2, "--calibration-data", tmp_path, model="smollm2-135m"
    )
    assert "text.txt: calibration data must be an .npz file" in refused(7, "--calibration-data", tmp_path / "text.txt")
    assert "absent.npz: cannot be read: No such file" in refused(7, "--calibration-data", tmp_path / "absent.npz")
    (tmp_path / "empty").mkdir()
    assert "empty: holds no .npz file" in refused(7, "--calibration-data", tmp_path / "empty")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    assert "broken.npz: not an .npz of arrays (damaged)" in refused(7, "--calibration-data", tmp_path / "broken.npz")
    np.savez(tmp_path / "objects.npz", idx=np.array([{}], dtype=object))
    said = refused(7, "--calibration-data", tmp_path / "objects.npz")
    assert "objects.npz: not an .npz of arrays (it holds Python objects, which are never loaded)" in said


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"ids": draw(4, 8)}, "lacks idx: the program reads idx int64 ("),
        ({"idx": draw(4, 8), "mask": draw(4, 8)}, "holds mask: the program reads idx int64 ("),
        ({"idx": draw(4, 8).int()}, "idx is int32, the program reads int64: convert it"),
        ({"idx": draw(4, 8)[0]}, "idx has shape (8,), the program reads idx int64 ("),
        ({"idx": draw(4, 8) + VOCABULARY}, "ids are 0 to 96"),
        ({"idx": draw(4, LONGEST + 1)}, "the program does not take idx ("),
        (
            {"idx": draw(1, 8)},
            "1 samples, at least 2 are needed: the first 80 % calibrates, the last 20 % measures, and neither part may",
        ),
    ],
)
def test_calibration_that_does_not_fit(
    refused: Callable[..., str], tmp_path: Path, arrays: dict[str, torch.Tensor], said: str
) -> None:
    np.savez(tmp_path / "inputs.npz", **{name: value.numpy() for name, value in arrays.items()})
    assert said in refused(7, "--calibration-data", tmp_path / "inputs.npz")


def test_healing_wants_text(refused: Callable[..., str], saved: Path) -> None:
    data = saved.with_name("inputs.npz")
    assert "--effort heal distils on text" in refused(2, "--effort", "heal", "--calibration-data", data)
