"""Times of kernels: which products a width decides, what is timed for them, and what is kept of that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dotresize_fx.cost import macs_per_unit
from dotresize_fx.errors import UsageError
from dotresize_fx.export import kernel_times as module
from dotresize_fx.export.graph_inputs import make_inputs
from dotresize_fx.export.kernel_times import cache_file, conditions, kernel_times, read_times, write_kernels
from dotresize_fx.export.latency_target import sampled
from dotresize_fx.export.onnx_session import OnnxModel
from dotresize_fx.export.region_kernels import Kernel, Step, kernels_of, steps_of
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.progress import Progress
from dotresize_fx.workload import Workload

pytest.importorskip("onnxruntime")

KERNELS = [Kernel(1, 8, 24), Kernel(5, 24, 8), Kernel(5, 4, 7, groups=3)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOTRESIZE_FX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def macs(kernel: Kernel) -> int:
    return max(kernel.groups, 1) * kernel.rows * kernel.inner * kernel.columns


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_kernels_multiply_what_the_width_costs(tiny_graph: Callable[[str], tuple[Any, FxGraph]], kind: str) -> None:
    graph = tiny_graph(kind)[1]
    regions = list(find_regions(graph).of_kind("ffn", "value", "query_key", "kv_heads"))
    assert {region.kind for region in regions} >= {"ffn", "value", "query_key"}
    for region in regions:
        for width in {region.width, region.width // 2}:
            for step in (Step(3, 10, 10), Step(3, 1, 17)):
                counted = sum(count * macs(k) for k, count in kernels_of(graph, region, width, step).items())
                assert counted == step.batch * step.tokens * width * macs_per_unit(graph, region, step.keys)


def test_experts_are_refused(tiny_graph: Callable[[str], tuple[Any, FxGraph]]) -> None:
    graph = tiny_graph("mixtral")[1]
    with pytest.raises(UsageError, match="experts cannot be timed alone"):
        kernels_of(graph, next(find_regions(graph).of_kind("experts")), 16, Step(1, 4, 4))


def test_a_workload_is_a_prompt_and_tokens_behind_it() -> None:
    assert steps_of(Workload(128, 16, 2)) == [(Step(2, 128, 128), 1), (Step(2, 1, 137), 16)]
    assert steps_of(Workload(128, 0, 2)) == [(Step(2, 128, 128), 1)]


def test_sampled_widths_are_on_the_grid_with_both_ends() -> None:
    assert sampled(64, 8) == [8, 16, 24, 32, 40, 48, 56, 64]
    assert sampled(8, 16) == [8]
    many = sampled(11008, 16)
    assert len(many) == 12
    assert (many[0], many[-1]) == (16, 11008)
    assert all(width % 16 == 0 for width in many)


def test_the_model_that_is_timed_multiplies_what_it_says(tmp_path: Path) -> None:
    path, plans = write_kernels(KERNELS, tmp_path)
    fed = make_inputs(plans, 1, 1, 0)
    found = OnnxModel(path)(fed)
    weights = np.fromfile(tmp_path / "kernels.bin", np.float32)
    for kernel, most in zip(KERNELS, found, strict=True):
        if kernel.groups:
            right = fed[f"x_{kernel.groups}x{kernel.inner}x{kernel.columns}"]
            left = fed[f"x_{kernel.groups}x{kernel.rows}x{kernel.inner}"]
        else:
            right = weights[: kernel.inner * kernel.columns].reshape(kernel.inner, kernel.columns)
            left = fed[f"x_{kernel.rows}x{kernel.inner}"]
        assert most == pytest.approx((left @ right).max(), rel=1e-5)


def test_only_what_is_not_known_is_timed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernel_times(KERNELS[:2], 1, Progress(quiet=True))
    assert all(seconds > 0 for seconds in found.values())
    timed: list[Kernel] = []
    really = module._timed

    def noted(kernels: Any, *rest: Any) -> dict[str, float]:
        timed.extend(kernels)
        return really(kernels, *rest)

    monkeypatch.setattr(module, "_timed", noted)
    again = kernel_times(KERNELS, 1, Progress(quiet=True))
    assert timed == [KERNELS[2]]
    assert {kernel: again[kernel] for kernel in KERNELS[:2]} == found
    assert [file.suffix for file in cache.iterdir()] == [".json"]


def test_what_is_known_follows_a_machine_that_has_become_slower(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, _ = KERNELS
    speed = 1.0

    def made_up(kernels: Any, *_: Any) -> dict[str, float]:
        return {str(kernel): speed * macs(kernel) * 1e-9 for kernel in kernels}

    monkeypatch.setattr(module, "_timed", made_up)
    before = kernel_times([first, second], 1, Progress(quiet=True), anchors=[first])
    speed = 2.0
    after = kernel_times(KERNELS, 1, Progress(quiet=True), anchors=[first])
    assert after == pytest.approx({kernel: 2e-9 * macs(kernel) for kernel in KERNELS})
    assert before == pytest.approx({kernel: 1e-9 * macs(kernel) for kernel in (first, second)})
    # All that is kept is of the speed of the first time.
    kept = read_times(cache_file(conditions(1)), conditions(1))
    assert kept == pytest.approx({str(kernel): 1e-9 * macs(kernel) for kernel in KERNELS})


def test_times_are_of_the_same_conditions_alone(cache: Path) -> None:
    one, two = conditions(1), conditions(2)
    assert cache_file(one) != cache_file(two)
    kernel_times(KERNELS[:1], 1, Progress(quiet=True))
    assert read_times(cache_file(one), one).keys() == {str(KERNELS[0])}
    assert read_times(cache_file(two), two) == {}
    assert read_times(cache_file(one), {**one, "onnxruntime": "1.0"}) == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"schema_version": 1', '"schema_version": 0'),
        lambda text: json.dumps({**json.loads(text), "seconds": {str(KERNELS[0]): "fast"}}),
        lambda text: json.dumps({**json.loads(text), "seconds": {str(KERNELS[0]): -1.0}}),
        lambda text: "\udcff",
    ],
)
def test_a_damaged_file_is_measured_anew(cache: Path, damage: Callable[[str], str]) -> None:
    where = conditions(1)
    kernel_times(KERNELS[:1], 1, Progress(quiet=True))
    file = cache_file(where)
    assert file is not None
    file.write_text(damage(file.read_text(encoding="utf-8")), encoding="utf-8", errors="surrogateescape")
    assert read_times(file, where) == {}
    assert kernel_times(KERNELS[:1], 1, Progress(quiet=True))[KERNELS[0]] > 0
    assert read_times(file, where).keys() == {str(KERNELS[0])}


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DOTRESIZE_FX_CACHE", str(tmp_path / "file"))
    assert kernel_times(KERNELS[:1], 1, Progress(quiet=True))[KERNELS[0]] > 0
