"""Proof of a slim ONNX file without another program: the file it came of, with zeros where widths went.

A width of k neurons computes what one of n does, k of which are those and the others read by zeros. So the dense graph,
untouched but for such weights, must put out what the slim file does: only the order of sums differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dotresize_fx.errors import VerificationError
from dotresize_fx.export.onnx_runtime import Comparison, compare_outputs
from dotresize_fx.gram import padding_input
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.onnx_form.region_sums import Overrides
from dotresize_fx.onnx_form.start import MASK
from dotresize_fx.passes.region_ends import tables_of
from dotresize_fx.passes.slim_onnx_graph import SlimmedOnnx
from dotresize_fx.regions import Region, RegionKind

TWIN = "the dense file with zeros in place of what was cut"
WITHOUT_TWIN = "the graph that it was written from"
Inputs = Mapping[str, torch.Tensor]
# Of the largest output, by dtype of the weights: sums in another order.
RELATIVE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
RELATIVE_FLOAT32 = 1e-4
# Kinds whose numbers stand in a row, head by head; others have tables or scales that go with a size.
PADDED = (RegionKind.FFN, RegionKind.VALUE)


def padded_weights(slimmed: SlimmedOnnx) -> Overrides | None:
    """What stands in for the dense graph's constants, by name; None where the cuts have no form of dense width."""
    dense, slim = slimmed.dense, slimmed.graph
    cut = {entry.region.name: entry for entry in slimmed.swept if entry.width < entry.region.width}
    changed = [entry.region for entry in slimmed.swept if entry.method != "kept"]
    if any(entry.region.kind not in PADDED for entry in cut.values()):
        return None
    found: Overrides = {}
    for name in dict.fromkeys(name for region in changed for name in (*region.writers, *region.readers)):
        old, new = dense.op(name), slim.op(name)
        weight, bias = slim.weight(new), slim.bias(new)
        for entry in cut.values():
            if name in entry.region.writers:
                weight = _padded(weight, 0, entry.region, entry.width)
                bias = None if bias is None else _padded(bias, 0, entry.region, entry.width)
            if name in entry.region.readers:
                weight = _padded(weight, 1, entry.region, entry.width)
        owned = [value for value in (old.weight, old.bias) if value is not None]
        if (bias is None) != (old.bias is None) or any(len(dense.users(value)) > 1 for value in owned):
            return None
        assert old.weight is not None
        found[old.weight.name] = dense.as_stored(old, weight).contiguous()  # as it is fed
        if bias is not None and old.bias is not None:
            found[old.bias.name] = bias
    if any(tables_of(dense, entry.region) for entry in cut.values()):
        return None
    return found


def _padded(tensor: torch.Tensor, axis: int, region: Region, width: int) -> torch.Tensor:
    """Zeros behind each head's ``width`` numbers along an axis, up to the region's width."""
    size = list(tensor.shape)
    heads = size[axis] // width
    parted = tensor.reshape(*size[:axis], heads, width, *size[axis + 1 :])
    zeros = parted.new_zeros(*size[:axis], heads, region.width - width, *size[axis + 1 :])
    return torch.cat([parted, zeros], axis + 1).reshape(*size[:axis], heads * region.width, *size[axis + 1 :])


def verify_onnx(
    given: OnnxGraph, slimmed: SlimmedOnnx, path: Path, batches: Sequence[Inputs], work: Path
) -> tuple[Comparison, float, tuple[str, ...]]:
    """The slim file in ONNX Runtime on these inputs: (comparison, what is allowed, notes).

    Where the file's graph, ``given``, was rewritten to be cut, the rewritten one is held against it first.

    Raises:
        VerificationError: something differs by more, or is NaN on one side alone.
    """
    overrides = padded_weights(slimmed)
    slim = slimmed.graph
    run = OnnxExecution(slim if overrides is None else slimmed.dense).whole(overrides)
    feeds = OnnxExecution(slim)
    relative = max((RELATIVE.get(dtype, RELATIVE_FLOAT32) for dtype in _dtypes(slim)), default=RELATIVE_FLOAT32)
    if not slimmed.untouched:
        _compare_rewritten(given, slimmed.dense, batches[0], relative)

    def cases() -> Iterator[tuple[dict[str, Any], list[Any]]]:
        for batch in batches:
            found = zip(feeds.results, run(batch), strict=True)
            expected = [_at_width(output, slim.shape_of(name)).numpy() for name, output in found]
            yield {name: value.numpy() for name, value in feeds.completed(batch).items()}, expected

    masked = all(padding_input(batch) is not None for batch in batches)
    comparison = compare_outputs(path, cases(), work, mask=MASK if masked else None)
    allowed = relative * max(comparison.max_abs_expected, 1e-6)
    if not comparison.max_abs_difference <= allowed:
        raise VerificationError(
            f"the slim ONNX differs from {WITHOUT_TWIN if overrides is None else TWIN} by "
            f"{comparison.max_abs_difference:.2e} (tolerance {allowed:.0e}): nothing was written; please report this "
            "model"
        )
    return comparison, allowed, (f"verified against {WITHOUT_TWIN if overrides is None else TWIN}",)


def _at_width(output: torch.Tensor, shape: Sequence[int | str]) -> torch.Tensor:
    """Of a cache whose heads were cut, without the zeros."""
    size = shape[-1] if len(shape) == output.ndim and output.ndim else None
    return output[..., :size] if isinstance(size, int) else output


@torch.no_grad()
def _compare_rewritten(given: OnnxGraph, rewritten: OnnxGraph, batch: Inputs, relative: float) -> None:
    pairs = zip(OnnxExecution(given).outputs(batch), OnnxExecution(rewritten).outputs(batch), strict=True)
    for one, other in pairs:
        away, size = (one.float() - other.float()).abs(), one.float().abs().max() if one.numel() else torch.zeros(())
        if away.numel() and not away.nan_to_num().max() <= relative * size.clamp_min(1e-6):
            raise VerificationError(
                f"the graph rewritten to be cut differs from the file's by {float(away.max()):.2e}: nothing was "
                "written; please report this model"
            )


def _dtypes(graph: OnnxGraph) -> set[torch.dtype]:
    return {graph.weight(op).dtype for op in graph.ops if op.is_linear}
