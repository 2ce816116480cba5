"""The compiler's own checks between the passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from dotresize_fx.compiler import analyse, slim, slim_with
from dotresize_fx.errors import CaptureError, TextError, UsageError
from dotresize_fx.export.capture import TRACED_LENGTH
from dotresize_fx.export.model_source import load_model
from dotresize_fx.options import Options
from dotresize_fx.plan_file import write_plan
from dotresize_fx.progress import Progress
from dotresize_fx.width_plan import WidthPlan

SaveModel = Callable[..., Path]


class AnotherAnswer(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Computes something else for any length but the traced one; torch.export does not see that there are two ways."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        shift = 0 if input_ids.shape[1] == TRACED_LENGTH else 1
        return super().forward((input_ids + shift) % 300, attention_mask, **kwargs)


def test_a_capture_that_holds_for_the_traced_shape_only(tmp_path: Path, save_tiny_model: SaveModel) -> None:
    loaded = load_model(str(save_tiny_model(tmp_path)))
    loaded.model.__class__ = AnotherAnswer
    with pytest.raises(CaptureError, match=r"AnotherAnswer holds for a length of 16 alone.*torch.export said: "):
        analyse(loaded, Progress(quiet=True))


def test_a_bad_text_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(TextError, match="holds no text"):
        slim(tmp_path / "no model", calibration=tmp_path / "empty.txt")


FEW: dict[str, Any] = {"calibration_tokens": 1024, "sequence_length": 32, "evaluation_tokens": 64, "device": "cpu"}


@pytest.mark.parametrize(
    ("effort", "options"), [("fast", {}), ("best", {"repair_steps": 10}), ("heal", {"repair_steps": 10})]
)
def test_an_effort_does_what_the_lesser_one_does_and_more(
    tmp_path: Path, save_tiny_model: SaveModel, effort: str, options: dict[str, Any]
) -> None:
    model = save_tiny_model(tmp_path)
    result = slim(model, 0.2, effort=effort, heal_minutes=0.02, **options, **FEW)
    repaired = [entry for entry in result.swept if "loss after repair" in entry.notes]
    assert bool(repaired) == (effort != "fast")
    assert any(note.startswith("healed for ") for note in result.notes) == (effort == "heal")
    assert all(tensor.isfinite().all() for tensor in result.slim.program.state_dict.values())


@pytest.mark.gpu
@pytest.mark.parametrize("basis", ["shared", "sublayer"])
@pytest.mark.parametrize("method", ["auto", "pca", "dotresize", "magnitude"])
def test_a_stream_is_cut_and_repaired_on_a_gpu(
    tmp_path: Path, save_tiny_model: SaveModel, basis: str, method: str
) -> None:
    options: dict[str, Any] = {**FEW, "device": "cuda", "regions": ("residual",), "basis": basis, "method": method}
    result = slim(save_tiny_model(tmp_path), 0.2, effort="best", repair_steps=10, **options)
    assert any("loss after repair" in entry.notes for entry in result.swept)
    assert not [note for entry in result.swept for note in entry.notes.values() if "recorded" in str(note)]
    assert all(tensor.isfinite().all() for tensor in result.slim.program.state_dict.values())


def test_a_plan_is_followed_instead_of_a_ratio(tmp_path: Path, save_tiny_model: SaveModel) -> None:
    model = save_tiny_model(tmp_path / "model")
    file = tmp_path / "plan.json"
    write_plan(WidthPlan({"model.layers.0.mlp": 41}), file)
    result = slim(model, plan=file, **FEW)
    assert result.options.ratio is None
    assert [(entry.region.name, entry.width) for entry in result.swept] == [("model.layers.0.mlp", 41)]
    file.write_text("{}")
    with pytest.raises(UsageError, match=r"--plan .*plan\.json: not a width plan"):
        slim(model, plan=file, **FEW)


def test_options_are_checked_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--method pca does not cut what is cut by default"):
        slim(tmp_path / "no model", method="pca")


def test_a_memory_budget_is_for_one_process(tmp_path: Path) -> None:
    launched: Any = SimpleNamespace(count=2, rank=0)
    with pytest.raises(UsageError, match="--memory-budget is for one process"):
        slim_with(Options(memory_budget=1 << 30), str(tmp_path), launched, progress=Progress(quiet=True))


def test_products_in_half_precision_change_little(tmp_path: Path, save_tiny_model: SaveModel) -> None:
    """The same plan but for a step, errors on held-out rows as large within a tenth, and a note."""
    folder = str(save_tiny_model(tmp_path / "model", num_hidden_layers=2))
    whole, half = (slim(folder, 0.2, regions=("ffn",), compute_dtype=dtype, **FEW) for dtype in ("float32", "bfloat16"))
    assert any("products of activations in bfloat16" in note for note in half.notes)
    assert not any("products of activations in bfloat16" in note for note in whole.notes)
    errors = [[one.error for one in result.swept] for result in (whole, half)]
    assert errors[0] != errors[1]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
    assert all(tensor.dtype is torch.float32 for tensor in half.slim.program.state_dict.values())
    report = half.save(tmp_path / "out")
    assert report.figures.verification.passed
    assert not half.dense.half_products  # what is measured is float32's
    assert not half.slim.half_products


@pytest.mark.parametrize("options", [{"method": "rank"}, {"method": "rom"}, {"methods": ("width", "rank")}])
def test_ranks_in_half_precision(tmp_path: Path, save_tiny_model: SaveModel, options: dict[str, Any]) -> None:
    folder = str(save_tiny_model(tmp_path / "model", num_hidden_layers=2))
    found = slim(folder, 0.2, compute_dtype="bfloat16", **options, **FEW)
    assert found.slimmed.factorized or found.swept
