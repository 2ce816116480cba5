"""What healing's tests share: a tiny model, a cut copy of it, batches, and healing with few steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.healing import HealOptions, HealResult, heal
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.fold_linears import FoldLinears
from dotresize_fx.passes.insert_maps import InsertMaps
from dotresize_fx.solvers import SOLVERS
from dotresize_fx.sweep import Sweep

Batch = Mapping[str, torch.Tensor]


@pytest.fixture(scope="session")
def cut() -> Callable[..., FxGraph]:
    """``cut(dense, batches, width=8)``: every FFN keeps its neurons of the largest norm; nothing is refitted."""
    return _cut


def _cut(dense: FxGraph, batches: list[Batch], width: int = 8) -> FxGraph:
    slim = dense.copy()

    def apply(region: Any, found: Any) -> None:
        insert = InsertMaps(region, found)
        insert(slim)
        FoldLinears(insert.downs, insert.ups)(slim)

    sweep = Sweep(dense, slim, batches, apply, refit=False)
    for region in find_regions(slim).of_kind("ffn"):
        sweep.slim_sublayer([(region, width)], lambda _: [("magnitude", SOLVERS["magnitude"])])
    return slim


@pytest.fixture(scope="module")
def dense(tiny_graph: Callable[[str], tuple[Any, FxGraph]]) -> FxGraph:
    return tiny_graph("llama")[1]


@pytest.fixture(scope="module")
def batches(tiny_batch: Callable[..., Batch]) -> list[Batch]:
    return [tiny_batch(4, 32, padding=5, seed=seed) for seed in range(32)]


@pytest.fixture(scope="module")
def held_out(tiny_batch: Callable[..., Batch]) -> list[Batch]:
    return [tiny_batch(4, 32, seed=seed) for seed in (100, 101)]


@pytest.fixture(scope="module")
def slim(dense: FxGraph, batches: list[Batch], cut: Callable[..., FxGraph]) -> FxGraph:
    return cut(dense, batches[:2])


@pytest.fixture(scope="session")
def options() -> Callable[..., HealOptions]:
    """``options(**changed)``: few steps on few tokens."""
    return lambda **changed: HealOptions(
        **{"steps": 24, "step_tokens": 128, "learning_rate": 2e-3, "evaluate_every": 6} | changed
    )


@pytest.fixture(scope="session")
def same_weights() -> Callable[[FxGraph, FxGraph], bool]:
    """``same_weights(first, second)``: whether their state dicts are equal to the bit."""

    def same(first: FxGraph, second: FxGraph) -> bool:
        one, other = first.program.state_dict, second.program.state_dict
        return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

    return same


@pytest.fixture(scope="module")
def healed(
    dense: FxGraph, slim: FxGraph, batches: list[Batch], held_out: list[Batch], options: Callable[..., HealOptions]
) -> Callable[..., tuple[FxGraph, HealResult]]:
    """``healed(batches=..., checkpoint=..., **options)``: a healed copy of ``slim``, and what was said about it."""

    def run(given: list[Batch] | None = None, **changed: Any) -> tuple[FxGraph, HealResult]:
        copied = slim.copy()
        rest = {name: changed.pop(name) for name in ("checkpoint", "advanced") if name in changed}
        return copied, heal(dense, copied, given or batches, held_out, options(**changed), **rest)

    return run
