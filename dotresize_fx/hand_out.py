"""What rank 0 found alone, handed to the ranks that help it: two programs and batches, the same to the bit."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dotresize_fx.fidelity import Inputs
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.ranks import Ranks


class Handed(NamedTuple):
    """The programs, lists of batches, and the task; ``numbers`` are what else has to be known, by name."""

    dense: FxGraph
    slim: FxGraph
    sources: Sequence[Sequence[Inputs]]
    task: str
    numbers: Mapping[str, Mapping[str, int] | None] = {}


def give(handed: Handed) -> None:
    """On rank 0, while the others ``take``; alone, nothing. A tensor that several names share goes, and stays, one."""
    if (ranks := Ranks()).count == 1:
        return
    places: dict[tuple[object, ...], int] = {}
    tensors: list[torch.Tensor] = []
    programs, keys = [], []
    graphs = list(dict.fromkeys((handed.dense, handed.slim)))  # one, where a copy is still to be slimmed
    for graph in graphs:
        stored = graph.program.state_dict
        for tensor in stored.values():
            if _identity(tensor) not in places:
                places[_identity(tensor)] = len(tensors)
                tensors.append(tensor)
        programs.append(_without_weights(graph))
        keys.append({key: places[_identity(tensor)] for key, tensor in stored.items()})
    sources = [[{name: value.cpu() for name, value in batch.items()} for batch in part] for part in handed.sources]
    content = io.BytesIO()
    shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
    caches = [dict(graph.caches) for graph in graphs]
    numbers = {name: None if part is None else dict(part) for name, part in handed.numbers.items()}
    half = handed.dense.half_products
    torch.save([programs, keys, caches, half, shapes, sources, handed.task, numbers], content)
    device = tensors[0].device
    buffer = torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8).to(device)
    ranks.share_first([torch.tensor([len(buffer)], device=device)])
    ranks.share_first([buffer])
    ranks.share_first(tensors)


def take(device: str) -> Handed:
    """What rank 0 gives, on this rank's device."""
    ranks = Ranks()
    ranks.share_first([size := torch.zeros(1, dtype=torch.int64, device=device)])
    ranks.share_first([buffer := torch.empty(int(size), dtype=torch.uint8, device=device)])
    programs, keys, caches, half, shapes, sources, task, numbers = torch.load(
        io.BytesIO(buffer.cpu().numpy().tobytes()), weights_only=True
    )
    tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
    ranks.share_first(tensors)
    graphs = [_with_weights(*parts, tensors, device) for parts in zip(programs, keys, strict=True)]
    for graph, known in zip(graphs, caches, strict=True):
        graph.caches.update(known)
        graph.half_products = half
    here = [[{name: value.to(device) for name, value in batch.items()} for batch in part] for part in sources]
    return Handed(graphs[0], graphs[-1], here, task, numbers)


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _without_weights(graph: FxGraph) -> bytes:
    """The program on the CPU, with a number in place of each tensor of its state dict."""
    bare = graph.copy()
    for key, tensor in bare.program.state_dict.items():
        bare.program.state_dict[key] = _like(tensor, torch.zeros((), dtype=tensor.dtype))
    bare.to("cpu")
    content = io.BytesIO()
    torch.export.save(bare.program, content)
    return content.getvalue()


def _with_weights(program: bytes, keys: dict[str, int], tensors: Sequence[torch.Tensor], device: str) -> FxGraph:
    graph = FxGraph(torch.export.load(io.BytesIO(program)))
    stored: dict[str, Any] = graph.program.state_dict
    for key, place in keys.items():
        stored[key] = _like(stored[key], tensors[place])
    if device != "cpu":
        graph.to(device)
    return graph


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """``new`` as a parameter where ``old`` is one."""
    return torch.nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, torch.nn.Parameter) else new
