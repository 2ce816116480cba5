"""Other tools' methods on a tiny Llama with grouped heads: what goes is what was asked, and each does its own trick."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RATIOS = [0.2, 0.3, 0.5]
PEERS = ["torch-pruning-taylor", "flap-wifv", "modegpt"]


@pytest.fixture(scope="module")
def peers() -> Iterator[ModuleType]:
    """The benchmarks' package, which is no part of the installed one."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import peers

        yield peers
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    # Some channels of every layer matter less, as they do in a trained model.
    for layer in model.model.layers:
        layer.mlp.down_proj.weight *= torch.linspace(0.2, 1.0, 96)[torch.randperm(96)]
    return model


def batch(rows: int, length: int, padding: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, length - padding :] = 0
    return {"input_ids": torch.randint(0, 100, (rows, length), generator=generator), "attention_mask": mask}


@pytest.fixture(scope="module")
def calibration() -> list[dict[str, torch.Tensor]]:
    return [batch(8, 32, seed=1), batch(8, 24, padding=6, seed=2)]


@pytest.fixture
def cut(peers: ModuleType, model: Any, calibration: list[dict[str, torch.Tensor]]) -> Callable[..., tuple[Any, Any]]:
    """``cut(peer, ratio, **options)``: (a cut copy, the peer's result)."""

    def run(name: str, ratio: float, **options: Any) -> tuple[Any, Any]:
        if name.startswith("torch-pruning"):
            pytest.importorskip("torch_pruning")
        slim = copy.deepcopy(model)
        return slim, peers.PEERS[name](slim, calibration, ratio, **options)

    return run


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def error(slim: Any, model: Any) -> float:
    """Of the logits, on text that did not calibrate."""
    inputs = batch(16, 32, seed=3)
    return float((logits(slim, inputs) - logits(model, inputs)).norm() / logits(model, inputs).norm())


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", PEERS)
def test_the_asked_share_is_gone(
    peers: ModuleType, model: Any, cut: Callable[..., tuple[Any, Any]], name: str, ratio: float
) -> None:
    slim, result = cut(name, ratio)
    channel = 3 * 48
    assert abs(result.removed_weights - ratio * peers.block_weights(model)) <= channel
    assert result.notes
    zeros = sum(
        int((part.weight == 0).sum())
        for layer in slim.model.layers
        for part in layer.modules()
        if isinstance(part, torch.nn.Linear)
    )
    assert peers.block_weights(slim) - zeros == peers.block_weights(model) - result.removed_weights
    assert logits(slim, batch(3, 11, padding=4)).isfinite().all()
    assert not any(p.requires_grad for p in slim.parameters())


@pytest.mark.parametrize("name", PEERS)
def test_nothing_asked_changes_nothing(model: Any, cut: Callable[..., tuple[Any, Any]], name: str) -> None:
    slim, result = cut(name, 0.0)
    assert result.removed_weights == 0
    assert error(slim, model) <= 1e-4


@pytest.mark.parametrize("name", ["torch-pruning-taylor", "flap-wifv"])
def test_what_is_chosen_beats_the_opposite_choice(model: Any, cut: Callable[..., tuple[Any, Any]], name: str) -> None:
    slim, _ = cut(name, 0.2)
    widths = [layer.mlp.gate_proj.out_features for layer in slim.model.layers]
    worst = copy.deepcopy(model)
    for layer, width in zip(worst.model.layers, widths, strict=True):
        mlp = layer.mlp
        least = mlp.down_proj.weight.norm(dim=0).argsort()[:width]
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight = torch.nn.Parameter(part.weight[least], requires_grad=False)
        mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, least], requires_grad=False)
    assert error(slim, model) < error(worst, model)


def test_flap_compensates_what_it_removes(model: Any, cut: Callable[..., tuple[Any, Any]]) -> None:
    with_bias, _ = cut("flap-wifv", 0.3)
    without, _ = cut("flap-wifv", 0.3, compensate=False)
    assert error(with_bias, model) < error(without, model)


def test_flap_widths_differ_between_layers(peers: ModuleType, model: Any, calibration: Any) -> None:
    uneven = copy.deepcopy(model)
    # One channel far above the others raises its layer's spread, so that the rest of that layer looks alike.
    uneven.model.layers[0].mlp.down_proj.weight[:, 5] *= 30
    peers.flap_wifv(uneven, calibration, 0.3)
    first, second = (layer.mlp.gate_proj.out_features for layer in uneven.model.layers)
    assert first != second


def test_modegpt_refits_what_reads_the_channels(model: Any, cut: Callable[..., tuple[Any, Any]]) -> None:
    refitted, _ = cut("modegpt", 0.3)
    dropped, _ = cut("modegpt", 0.3, least_squares=False)
    assert error(refitted, model) < error(dropped, model)


def test_modegpt_truncates_the_product_of_values_and_outputs_best(peers: ModuleType, model: Any) -> None:
    attention = copy.deepcopy(model.model.layers[0].self_attn)
    dense = copy.deepcopy(attention)
    inputs = torch.randn(400, 48, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    inputs *= torch.linspace(0.1, 2.0, 48)
    module = sys.modules["peers.modegpt"]
    module._truncate_values(attention, inputs.T @ inputs, 2, 5)

    def product(part: Any, group: int) -> torch.Tensor:
        """What KV head ``group`` gives each of its three query heads, side by side."""
        rows = slice(8 * group, 8 * group + 8)
        columns = part.o_proj.weight.double()[:, 24 * group : 24 * group + 24].unflatten(1, (3, 8))
        return torch.cat([inputs @ part.v_proj.weight.double()[rows].T @ columns[:, head].T for head in range(3)], 1)

    for group in range(2):
        lost = (product(attention, group) - product(dense, group)).norm()
        best = torch.linalg.svdvals(product(dense, group))[5:].norm()
        # float32 weights; no rank-5 product can be nearer than the truncated SVD.
        torch.testing.assert_close(lost, best, rtol=1e-5, atol=0)


def test_modegpt_keeps_rotary_pairs_together(model: Any, cut: Callable[..., tuple[Any, Any]]) -> None:
    slim, _ = cut("modegpt", 0.3)
    for layer in slim.model.layers:
        gone_q = (layer.self_attn.q_proj.weight == 0).all(1).view(2, 3, 2, 4)
        gone_k = (layer.self_attn.k_proj.weight == 0).all(1).view(2, 1, 2, 4)
        assert torch.equal(gone_q, gone_k[:, :, :1].expand_as(gone_q))
        assert torch.equal(gone_k[:, :, 0], gone_k[:, :, 1])
    assert any((layer.self_attn.k_proj.weight == 0).any() for layer in slim.model.layers)


def test_padding_counts_nowhere(peers: ModuleType, model: Any) -> None:
    padded = batch(2, 20, seed=5)
    padded["attention_mask"][:, 12:] = 0
    short = {name: value[:, :12] for name, value in padded.items()}
    for peer in (peers.flap_wifv, peers.modegpt):
        first, second = copy.deepcopy(model), copy.deepcopy(model)
        peer(first, [padded], 0.3)
        peer(second, [short], 0.3)
        assert error(first, second) <= 1e-4


def test_too_much_is_refused(peers: ModuleType, model: Any, calibration: Any) -> None:
    for peer in (peers.flap_wifv, peers.modegpt):
        with pytest.raises(ValueError, match="can"):
            peer(copy.deepcopy(model), calibration, 0.9)
