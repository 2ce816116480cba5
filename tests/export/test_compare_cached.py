"""A captured program with a cache against its model: what is wrong is found, and each weight is read once."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dotresize_fx.errors import CaptureError
from dotresize_fx.export import compare_cached as compared
from dotresize_fx.export.capture import Captured
from dotresize_fx.export.capture_cache import capture_with_cache
from dotresize_fx.offload.lazy_tensor import LazyTensor


@pytest.fixture(params=["llama", "gpt2", "gemma"])
def model(request: pytest.FixtureRequest, tiny_model: Callable[..., Any]) -> Any:
    return tiny_model(request.param)


def captured_of(model: Any) -> Captured:
    return capture_with_cache(model, compare=False)


@pytest.mark.parametrize("piece", [1, 40_000, 1 << 28])
def test_each_weight_is_read_once(model: Any, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Whatever a piece may hold; what holds more than one is read in parts, by each run."""
    monkeypatch.setattr(compared, "PIECE", piece)
    captured = captured_of(model)
    state: dict[str, Any] = captured.graph.program.state_dict
    reads = Counter[str]()
    live: list[weakref.ref[torch.Tensor]] = []
    held = []
    small = {key for key, tensor in state.items() if tensor.nbytes <= piece}

    def counted(key: str, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            reads[key] += 1
            live.append(weakref.ref(found := tensor.clone()))
            held.append(sum(there.nbytes for other in live if (there := other()) is not None))
            return found

        return read

    for key, tensor in list(state.items()):
        state[key] = LazyTensor(counted(key, tensor), tuple(tensor.shape), tensor.dtype)
    compared.compare_cached(model, captured)
    assert max(held) <= piece + 2 * max(tensor.nbytes for tensor in state.values())  # rows of a table among them
    blocks = {key for key in reads if ".1." in key}
    assert len(blocks) > 8
    assert {reads[key] for key in blocks & small} <= {1}
    assert all(reads[key] >= len(compared.SPLITS) for key in blocks - small)


def test_other_weights_are_found(model: Any) -> None:
    captured = captured_of(model)
    compared.compare_cached(model, captured)
    weight = next(
        tensor
        for name, tensor in model.named_parameters()
        if name.endswith("1.mlp.down_proj.weight") or "1.mlp.c_proj" in name
    )
    state: dict[str, Any] = captured.graph.program.state_dict
    for key, tensor in state.items():
        if tensor.data_ptr() == weight.data_ptr():
            state[key] = torch.nn.Parameter(2 * tensor)
    with pytest.raises(
        CaptureError, match="with a past of 0 and 16 new tokens the captured program computes something"
    ):
        compared.compare_cached(model, captured)


def test_a_past_that_is_not_looked_at_is_found(model: Any) -> None:
    """The program is right for a prompt in one go, and puts zeros in the place of a past."""
    captured = captured_of(model)
    graph = captured.graph
    with graph.nodes.inserting_after(node := graph.node(next(iter(graph.caches.values())))):
        gone = graph.nodes.call_function(torch.ops.aten.zeros_like.default, (node,))
    node.replace_all_uses_with(gone, delete_user_cb=lambda user: user is not gone)
    with pytest.raises(CaptureError, match="with a past of 9 and 7 new tokens"):
        compared.compare_cached(model, captured)
