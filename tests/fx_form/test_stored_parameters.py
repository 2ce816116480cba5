"""Parameters of a run that stay in files: each is read once for all batches of a piece, and told once what follows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.offload.held_weights import HeldWeights
from dotresize_fx.offload.lazy_tensor import LazyTensor
from dotresize_fx.offload.stored_tensors import Spool


def test_what_follows_is_read_ahead_once_for_all_batches(
    tiny_graph: Any, tiny_batch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, graph = tiny_graph("llama")
    stored, reads = graph.program.state_dict, Counter[str]()
    block = sum(tensor.nbytes for name, tensor in stored.items() if "layers.0." in name)
    graph.spool = Spool(tmp_path, held=block)

    def lazy(name: str, tensor: torch.Tensor) -> LazyTensor:
        def source() -> torch.Tensor:
            reads[name] += 1
            return tensor.detach()

        return LazyTensor(source, tuple(tensor.shape), tensor.dtype)

    for name, tensor in list(stored.items()):
        stored[name] = torch.nn.Parameter(lazy(name, tensor), requires_grad=False)
    told, ahead = [], HeldWeights.read_ahead
    monkeypatch.setattr(HeldWeights, "read_ahead", lambda held, what: (told.append(1), ahead(held, what)))
    execution = Execution(graph)
    for _ in range(2):  # the second time what comes first is not held any more
        reads.clear()
        told.clear()
        environments = [execution.start(tiny_batch(1, 8, seed=seed)) for seed in range(4)]
        position = 0
        for stop in execution.pieces(0, len(execution.nodes)):
            for environment in environments:
                execution.run(environment, position, stop)
            position = stop
        tables = {execution._keys[node] for node in execution._tables}
        assert {reads[name] for name in reads if name not in tables} == {1}
        assert len(told) == len(reads) - len(tables & reads.keys())
