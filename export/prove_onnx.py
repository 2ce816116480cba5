"""Proof of a slim ONNX file without another program: the file it came of, with zeros where widths went.

A width of k neurons computes what one of n does, k of which are those and the others read by zeros; two linears what
one with the product of their weights does; and fewer blocks what all do where the stream is led past some. So the dense
graph, untouched but for such weights, must put out what the slim file does: only the order of sums differs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dotresize_fx.errors import VerificationError
from dotresize_fx.export.onnx_runtime import compare_outputs
from dotresize_fx.export.onnx_session import provider_on
from dotresize_fx.gram import padding_input
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.onnx_form.runtime_values import to_numpy
from dotresize_fx.onnx_form.start import MASK
from dotresize_fx.passes.find_blocks import find_blocks
from dotresize_fx.passes.region_ends import tables_of
from dotresize_fx.passes.slim_onnx_graph import SlimmedOnnx
from dotresize_fx.regions import Region, RegionKind
from dotresize_fx.report.contents import Verification
from dotresize_fx.sweep import SweptRegion

TWIN = "the dense file with zeros for what was cut"
PRODUCTS = "the dense file with the products of the factors"
PASSED = "the dense file with the stream led past the blocks that went"
WITHOUT_TWIN = "the graph that it was written from"
Inputs = Mapping[str, torch.Tensor]
# Of an output's largest number, by dtype of the weights: sums in another order.
RELATIVE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
RELATIVE_FLOAT32 = 1e-4


@dataclass(frozen=True)
class Twin:
    """``graph`` is the dense one with other weights; of ``outputs``, a cache's, the slim file has these places along
    these axes alone. ``called`` is what it is in words.
    """

    graph: OnnxGraph
    outputs: Mapping[str, tuple[tuple[int, torch.Tensor], ...]]
    called: str = TWIN


def padded_twin(slimmed: SlimmedOnnx) -> Twin | None:
    """The dense graph with zeros in place of what was cut, products in place of factors, or the stream led past blocks;
    None where the cuts have no form of dense width.
    """
    if slimmed.gone:
        return Twin(_led_past(slimmed), {}, PASSED)
    if slimmed.factorized:
        return Twin(_multiplied(slimmed), {}, PRODUCTS)
    dense, slim = slimmed.dense, slimmed.graph
    cut = {entry.region.name: entry for entry in slimmed.swept if entry.width < entry.region.width}
    changed = [entry.region for entry in slimmed.swept if entry.method != "kept"]
    kept = {name: _places(entry, slimmed.pairs.get(name)) for name, entry in cut.items()}
    if any(tables_of(dense, entry.region) for entry in cut.values()):
        return None
    if any(len(set(places.tolist())) < len(places) for places in kept.values()):
        return None
    twin = dense.copy()
    for name in dict.fromkeys(name for region in changed for name in (*region.writers, *region.readers)):
        old, new = dense.op(name), slim.op(name)
        weight, bias = slim.weight(new), slim.bias(new)
        for entry in cut.values():
            if name in entry.region.writers:
                weight = _padded(weight, 0, entry.region, kept[entry.region.name])
                bias = None if bias is None else _padded(bias, 0, entry.region, kept[entry.region.name])
            if name in entry.region.readers:
                weight = _padded(weight, 1, entry.region, kept[entry.region.name])
        if (bias is None) != (old.bias is None):
            return None
        twin.set_weight(twin.op(name), weight)
        if bias is not None:
            twin.set_bias(twin.op(name), bias)
    outputs: dict[str, tuple[tuple[int, torch.Tensor], ...]] = {}
    for name, entry in cut.items():
        axis = 1 if entry.region.kind is RegionKind.HEADS else 3
        for output in entry.region.layout.cache if entry.region.layout is not None else ():
            outputs[output] = (*outputs.get(output, ()), (axis, kept[name]))
    return Twin(twin, outputs)


def _multiplied(slimmed: SlimmedOnnx) -> OnnxGraph:
    twin, slim = slimmed.dense.copy(), slimmed.graph
    for name in (linear.op for linear in slimmed.factorized):
        second = slim.op(name)
        first, weight, bias = slim.producer(second.inputs[0]), slim.weight(second), slim.bias(second)
        assert first is not None
        product = weight.double() @ slim.weight(first).double()
        twin.set_weight(twin.op(name), product.to(weight.dtype))
        if bias is not None:
            twin.set_bias(twin.op(name), bias)
    return twin


def _led_past(slimmed: SlimmedOnnx) -> OnnxGraph:
    """The gone blocks are still there, and so are their caches; the others have the slim graph's weights."""
    twin, slim = slimmed.dense.copy(), slimmed.graph
    blocks = find_blocks(twin)
    for i in sorted((block.number for block in slimmed.gone), reverse=True):
        twin.redirect(twin.op(blocks[i].ops[-1]), blocks[i].start)
    there = twin.positions
    for op in slim.ops:
        if op.name not in there or slim.caches.keys() & {op.name}:
            continue
        if op.weight is not None:
            twin.set_weight(twin.op(op.name), slim.weight(op))
        if (bias := slim.bias(op)) is not None:
            twin.set_bias(twin.op(op.name), bias)
        for value, own in zip(op.inputs, twin.op(op.name).inputs, strict=True):
            if value.is_parameter and not slim.is_buffer(value):
                twin.set_parameter(own, slim.parameter(value))
    return twin


def _places(entry: SweptRegion, pairs: torch.Tensor | None) -> torch.Tensor:
    """Which of the dense width's numbers are what is left: the first, but of rotary pairs those with their angles."""
    if pairs is None:
        return torch.arange(entry.width)
    return torch.cat([pairs, pairs + entry.region.width // 2])


def _padded(tensor: torch.Tensor, axis: int, region: Region, places: torch.Tensor) -> torch.Tensor:
    """Zeros along an axis in each head, or as whole heads, up to the region's width."""
    size, width = list(tensor.shape), len(places)
    heads = region.kind is RegionKind.HEADS
    rest = size[axis] // width
    parts, whole = ((width, rest), (region.width, rest)) if heads else ((rest, width), (rest, region.width))
    parted = tensor.reshape(*size[:axis], *parts, *size[axis + 1 :])
    found = parted.new_zeros(*size[:axis], *whole, *size[axis + 1 :])
    found.index_copy_(axis if heads else axis + 1, places, parted)
    return found.reshape(*size[:axis], rest * region.width, *size[axis + 1 :])


def verify_onnx(
    given: OnnxGraph, slimmed: SlimmedOnnx, path: Path, batches: Sequence[Inputs], work: Path, device: str = "cpu"
) -> Verification:
    """The slim file in ONNX Runtime on these inputs, on ``device`` (cpu or cuda). Each output is held to its own size.

    Where the file's graph, ``given``, was rewritten to be cut, the rewritten one is held against it first.

    Raises:
        VerificationError: something differs by more, or is NaN on one side alone.
    """
    twin = padded_twin(slimmed)
    slim = slimmed.graph
    execution = OnnxExecution(slim if twin is None else twin.graph, device)
    run, left = execution.whole(), [name not in slimmed.gone_caches for name in execution.results]
    taken = {} if twin is None else twin.outputs
    feeds = OnnxExecution(slim)
    relative = max((RELATIVE.get(dtype, RELATIVE_FLOAT32) for dtype in _dtypes(slim)), default=RELATIVE_FLOAT32)
    if not slimmed.untouched:
        _compare_rewritten(given, slimmed.dense, batches[0], relative, device)

    def cases() -> Iterator[tuple[dict[str, Any], list[Any]]]:
        for batch in batches:
            found = zip(feeds.results, itertools.compress(run(batch), left), strict=True)
            expected = [to_numpy(_taken(output, taken.get(name, ()))) for name, output in found]
            yield {name: to_numpy(value) for name, value in feeds.completed(batch).items()}, expected

    masked = all(padding_input(batch) is not None for batch in batches)
    provider = provider_on(device)
    comparison = compare_outputs(path, cases(), work, mask=MASK if masked else None, provider=provider)
    against = WITHOUT_TWIN if twin is None else twin.called
    found = replace(comparison.within_shares(relative), against=against)
    if not found.passed:
        raise VerificationError(
            f"the slim ONNX differs from {against} by {found.max_abs_difference:.2e} (tolerance "
            f"{found.tolerance:.0e}): nothing was written; please report this model"
        )
    return found


def _taken(output: torch.Tensor, places: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Of a cache whose heads were cut, without the zeros."""
    for axis, chosen in places:
        output = output.index_select(axis, chosen)
    return output


@torch.no_grad()
def _compare_rewritten(given: OnnxGraph, rewritten: OnnxGraph, batch: Inputs, relative: float, device: str) -> None:
    both = (OnnxExecution(graph, device).outputs(batch) for graph in (given, rewritten))
    for one, other in zip(*both, strict=True):
        one, other = one.float(), other.float()
        same = (one == other) | (one.isnan() & other.isnan())  # at padding both may be
        away = torch.where(same, 0.0, (one - other).abs())
        size = one[one.isfinite()].abs().max() if one.isfinite().any() else torch.zeros(())
        if away.numel() and not away.max() <= relative * size.clamp_min(1e-6):
            raise VerificationError(
                f"the graph rewritten to be cut differs from the file's by {float(away.max()):.2e}: nothing was "
                "written; please report this model"
            )


def _dtypes(graph: OnnxGraph) -> set[torch.dtype]:
    return {graph.weight(op).dtype for op in graph.ops if op.is_linear}
