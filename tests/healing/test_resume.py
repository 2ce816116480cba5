"""Healing that was killed goes on to the same bytes, and several processes are one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dotresize_fx.errors import UsageError
from dotresize_fx.fx_form.graph import FxGraph


class Killed(Exception):
    pass


def kill_after(calls: int) -> Callable[[], None]:
    left = iter(range(calls))

    def advanced() -> None:
        if next(left, None) is None:
            raise Killed

    return advanced


def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, slim: FxGraph, healed: Callable[..., Any], same_weights: Callable[..., bool]
) -> None:
    whole, result = healed()
    with pytest.raises(Killed):
        healed(checkpoint=tmp_path, advanced=kill_after(60))  # between the evaluations at steps 12 and 18
    assert [file.name for file in tmp_path.iterdir()] == ["heal.safetensors"]
    taken: list[None] = []
    resumed, second = healed(checkpoint=tmp_path, advanced=lambda: taken.append(None))
    assert same_weights(resumed, whole)
    assert [(s, kl) for s, _, kl in second.history] == [(s, kl) for s, _, kl in result.history]
    # What is finished is not done again.
    again, third = healed(checkpoint=tmp_path, advanced=kill_after(0))
    assert same_weights(again, whole)
    assert third.after == result.after


def test_a_checkpoint_of_another_run_is_refused_and_kept(tmp_path: Path, healed: Callable[..., Any]) -> None:
    healed(steps=2, checkpoint=tmp_path)
    file = tmp_path / "heal.safetensors"
    before = file.read_bytes()
    with pytest.raises(UsageError) as caught:
        healed(steps=2, checkpoint=tmp_path, seed=1)
    assert str(caught.value) == (
        f"--heal-checkpoint {tmp_path}: heal.safetensors in it is of another run (other model, options or data): "
        "choose another folder, or delete the file to start afresh"
    )
    assert file.read_bytes() == before


def test_a_damaged_checkpoint_is_no_checkpoint(
    tmp_path: Path, healed: Callable[..., Any], same_weights: Callable[..., bool]
) -> None:
    (tmp_path / "heal.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{]")
    assert same_weights(healed(steps=2, checkpoint=tmp_path)[0], healed(steps=2)[0])


SCRIPT = """
import sys
import torch
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.healing import heal
from dotresize_fx.healing.options import HealOptions

rank, count, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if count > 1:
    torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=count)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50)
    def forward(self, input_ids):
        return self.head(torch.tanh(self.table(input_ids)))

def graph(seed):
    torch.manual_seed(seed)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    return FxGraph(torch.export.export(Model(), (torch.zeros(2, 8, dtype=torch.int64),), dynamic_shapes=shapes))

batches = [{"input_ids": torch.randint(50, (3, 8), generator=torch.Generator().manual_seed(i))} for i in range(5)]
slim = graph(1)
options = HealOptions(steps=9, step_tokens=40, learning_rate=1e-2)
result = heal(graph(0), slim, batches[:4], batches[4:], options)
assert result.after < result.before
from safetensors.torch import save_file
save_file({k: v.detach() for k, v in slim.program.state_dict.items()}, f"{out}/{count}-{rank}.safetensors")
"""


def test_two_processes_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd steps of 5 rows are shared 3 to 2, and every rank ends with what one process alone finds."""
    from safetensors.torch import load_file

    root = Path(__file__).parent.parent.parent
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), "2", str(tmp_path / "store"), str(tmp_path)], cwd=root
        )
        for rank in (0, 1)
    ]
    try:
        monkeypatch.setattr(sys, "argv", ["alone", "0", "1", "", str(tmp_path)])
        exec(SCRIPT, {"__name__": "alone"})
        assert [run.wait(timeout=120) for run in runs] == [0, 0]
    finally:
        for run in runs:
            run.kill()
    first, second, alone = (load_file(tmp_path / f"{name}.safetensors") for name in ("2-0", "2-1", "1-0"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    torch.testing.assert_close(first, alone, rtol=1e-3, atol=1e-4)
