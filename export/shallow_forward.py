"""What converting a program with fewer blocks needs: what it is called with has fewer layers of cache."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from dotresize_fx.cache_names import PAST
from dotresize_fx.export.cached_forward import CachedForward, Layers
from dotresize_fx.export.capture import Captured

_LAYER = re.compile(rf"L\['{PAST}'\]\[(\d+)\]")


@dataclass(frozen=True)
class ShallowForward(CachedForward):
    """A forward pass with the cache of the layers that are left; what it computes is zeros of the right shapes."""

    vocabulary: int = 0

    def run(
        self, original: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor | None, past: Layers
    ) -> dict[str, Any]:
        rows, length = ids.shape
        first = past[0]["key"]
        present = [
            {
                name: torch.cat([value, value.new_zeros(rows, value.shape[1], length, value.shape[3])], 2)
                for name, value in layer.items()
            }
            for layer in past
        ]
        return {"logits": first.new_zeros(rows, length, self.vocabulary), "present": present}


def fitted_to(captured: Captured, program: torch.export.ExportedProgram) -> Captured:
    """``captured``, or, of a program that reads the cache of fewer layers, what stands for it where names are told."""
    cached = captured.cache
    if cached is None:
        return captured
    inputs = program.graph_signature.user_inputs
    left = sum(str(name).startswith(PAST) for name in inputs) // 2
    if left == len(cached.sizes):
        return captured
    sample = {**cached.sample, PAST: cached.sample[PAST][:left]}
    return replace(captured, cache=ShallowForward(cached.sizes[:left], cached.positions, sample, captured.vocabulary))


def guard_layers_left(program: torch.export.ExportedProgram) -> None:
    """Ask of layers that are there what torch noted of sizes of ones that are gone: they are the same in all layers."""
    given: Mapping[str, Any] = program.example_inputs[1] if program.example_inputs else {}
    if not (left := len(given.get(PAST, ()))):
        return
    program._guards_code = [
        _LAYER.sub(lambda found: found[0] if int(found[1]) < left else f"L['{PAST}'][0]", asked)
        for asked in program._guards_code
    ]
