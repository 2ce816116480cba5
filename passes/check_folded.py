"""Whether what a region's ends are once a map was folded is what was solved for: the products taken anew."""

from __future__ import annotations

import torch

from dotresize_fx.errors import VerificationError
from dotresize_fx.graph import Graph, Kind
from dotresize_fx.head_maps import over_heads
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region

# Of a weight's largest number: the map is rounded to the weight's dtype before it is folded.
RELATIVE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
RELATIVE_FLOAT32 = 1e-5
# By op: weight, and bias if there is one.
Ends = dict[str, tuple[torch.Tensor, torch.Tensor | None]]


def mapped_ends(graph: Graph, region: Region, found: RegionMap) -> Ends:
    """What the region's writers and readers are with the map in them, from the graph before it is edited."""
    ends: Ends = {}
    for name in region.writers:
        writer, down = graph.op(name), found.down_of(region, name)
        weight, bias = graph.weight(writer), graph.bias(writer)
        if writer.kind is Kind.EMBEDDING:
            ends[name] = (weight.double() @ over_heads(region, down, weight.shape[1])).to(weight.dtype), None
            continue
        matrix = over_heads(region, down, weight.shape[0])
        mapped = (matrix.mT @ weight.double()).to(weight.dtype)
        ends[name] = mapped, None if bias is None else (matrix.mT @ bias.double()).to(bias.dtype)
    for name in region.readers:
        reader = graph.op(name)
        weight, bias = graph.weight(reader), found.reader_biases.get(name, graph.bias(reader))
        if name in found.reader_weights:
            ends[name] = found.reader_weights[name].to(weight.dtype), bias
        elif found.up is not None:
            up = over_heads(region, found.up, weight.shape[1])
            ends[name] = (weight.double() @ up.mT).to(weight.dtype), bias
    return ends


def check_folded(graph: Graph, region: Region, ends: Ends) -> None:
    """
    Raises:
        VerificationError: a weight or bias of the edited graph is another one than in ``ends``.
    """
    for name, (weight, bias) in ends.items():
        op = graph.op(name)
        given = graph.weight(op)
        allowed = RELATIVE.get(given.dtype, RELATIVE_FLOAT32)
        pairs = [(given, weight), *([] if bias is None else [(graph.bias(op), bias)])]
        if not all(_agree(one, other, allowed) for one, other in pairs):
            raise VerificationError(
                f"{region.name}: {name} was not folded into what was solved for: nothing was written; please report "
                "this model"
            )


def _agree(found: torch.Tensor | None, expected: torch.Tensor, relative: float) -> bool:
    if found is None or found.shape != expected.shape:
        return False
    expected = expected.to(found.device, torch.float64)
    away = (found.double() - expected).abs().max() if found.numel() else 0.0
    return bool(away <= relative * expected.abs().max().clamp_min(1e-30)) if found.numel() else True
