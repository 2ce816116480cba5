"""RecogniseNorms: a decomposed RMSNorm is one op, what only looks like one is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.passes.drop_no_ops import DropNoOps
from dotresize_fx.passes.recognise_norms import RecogniseNorms

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
# The same formula summed in another order: float32 rounding only.
ROUNDING = 1e-6


def as_in_llama(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))


SPELLINGS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "llama": as_in_llama,
    "square and power": lambda m, x: (x.square().mean(2, keepdim=True) + 1e-3).pow(-0.5) * x * m.gain,
    "root and reciprocal": lambda m, x: x * (1e-3 + (x * x).mean(-1, True)).sqrt().reciprocal() * m.gain,
}


def gain() -> Parameter:
    return Parameter(torch.empty(4))


def test_before_and_after(
    trace: Callable[..., FxGraph],
    text: Callable[[FxGraph], str],
    run: Callable[..., list[torch.Tensor]],
    difference: Callable[..., float],
) -> None:
    graph = trace(as_in_llama, (2, 5, 4), gain=gain())
    assert (
        text(graph)
        == """\
pow_1: 4 = pow(x, 2)
mean_1: 1 = mean(pow_1)
add_1: 1 = add(mean_1, 0.001)
rsqrt_1: 1 = rsqrt(add_1)
mul_1: 4 = mul(x, rsqrt_1)
mul_2: 4 = mul(gain[4], mul_1)
return mul_2"""
    )
    before = run(graph, x=X)
    assert RecogniseNorms()(graph).records == ("mul_1: RMSNorm of x with its gain",)
    assert (
        text(graph)
        == """\
rms_norm_1: 4 = rms_norm(x, gain[4], eps=0.001)
return rms_norm_1"""
    )
    assert difference(run(graph, x=X), before) <= ROUNDING


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(
    trace: Callable[..., FxGraph],
    run: Callable[..., list[torch.Tensor]],
    difference: Callable[..., float],
    spelling: str,
) -> None:
    graph = trace(SPELLINGS[spelling], (2, 5, 4), gain=gain())
    before = run(graph, x=X)
    RecogniseNorms()(graph)
    assert [op.kind for op in graph.ops] == [Kind.RMS_NORM]
    assert difference(run(graph, x=X), before) <= ROUNDING


def as_in_cohere(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A layer norm without a bias; the difference is computed twice."""
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return m.gain * ((x - mean) * torch.rsqrt(variance + 1e-3))


def as_in_t5(m: Any, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return m.gain * (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-3))


def of_another_mean(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Not the mean of what it is subtracted from: an RMSNorm of a difference."""
    centred = x - (x + 1).mean(-1, keepdim=True)
    return m.gain * (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-3))


@pytest.mark.parametrize(
    ("forward", "kind"),
    [(as_in_cohere, Kind.LAYER_NORM), (as_in_t5, Kind.LAYER_NORM), (of_another_mean, Kind.RMS_NORM)],
)
def test_layer_norms(
    trace: Callable[..., FxGraph],
    run: Callable[..., list[torch.Tensor]],
    difference: Callable[..., float],
    forward: Any,
    kind: Kind,
) -> None:
    graph = trace(forward, (2, 5, 4), gain=gain())
    before = run(graph, x=X)
    RecogniseNorms()(graph)
    assert [op.kind for op in graph.ops if op.kind in (Kind.LAYER_NORM, Kind.RMS_NORM)] == [kind]
    assert difference(run(graph, x=X), before) <= ROUNDING


def test_without_a_gain(trace: Callable[..., FxGraph], text: Callable[[FxGraph], str]) -> None:
    graph = trace(lambda m, x: torch.relu(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)), (2, 5, 4))
    RecogniseNorms()(graph)
    assert (
        text(graph)
        == """\
rms_norm_1: 4 = rms_norm(x, eps=0.001)
relu_1: 4 = relu(rms_norm_1)
return relu_1"""
    )


def test_behind_casts(trace: Callable[..., FxGraph], run: Callable[..., list[torch.Tensor]]) -> None:
    """A bfloat16 model normalises in float32; ATen's op does so too, rounding to bfloat16 (8 bits) at the end."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        low = x.to(torch.bfloat16)
        wide = low.to(torch.float32)
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)).to(torch.bfloat16)
        return m.gain * normed

    graph = trace(forward, (2, 5, 4), gain=Parameter(torch.empty(4, dtype=torch.bfloat16)))
    before = run(graph, x=X)[0]
    DropNoOps()(graph)
    RecogniseNorms()(graph)
    assert [op.kind for op in graph.ops] == [Kind.KEEP, Kind.RMS_NORM]
    after = run(graph, x=X)[0]
    assert after.dtype is torch.bfloat16
    assert torch.allclose(after.float(), before.float(), rtol=2**-7, atol=0)


LOOKALIKES: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "mean over another dimension": lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-3),
    "mean of the cube": lambda m, x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 9.0),
    "root instead of its inverse": lambda m, x: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3),
    "mean square of something else": lambda m, x: x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-3),
    "dimension not kept": lambda m, x: x[:, 0] * torch.rsqrt(x[:, 0].pow(2).mean(-1) + 1e-3)[:, None],
    "epsilon scaled": lambda m, x: x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1.0, alpha=2.0)),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_stay(trace: Callable[..., FxGraph], text: Callable[[FxGraph], str], name: str) -> None:
    graph = trace(LOOKALIKES[name], (2, 5, 4))
    before = text(graph)
    assert not RecogniseNorms()(graph).modified
    assert text(graph) == before


def test_a_subtracted_epsilon_keeps_its_sign(
    trace: Callable[..., FxGraph], run: Callable[..., list[torch.Tensor]], difference: Callable[..., float]
) -> None:
    graph = trace(lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - 0.01), (2, 5, 4))
    before = run(graph, x=X)
    RecogniseNorms()(graph)
    assert difference(run(graph, x=X), before) <= ROUNDING


def test_a_gain_behind_a_slice_is_not_the_norms(
    trace: Callable[..., FxGraph], run: Callable[..., list[torch.Tensor]], difference: Callable[..., float]
) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))[:, -1] * m.gain

    graph = trace(forward, (2, 5, 4), gain=gain())
    before = run(graph, x=X)
    RecogniseNorms()(graph)
    assert graph.ops[0].kind is Kind.RMS_NORM
    assert graph.ops[0].weight is None
    assert difference(run(graph, x=X), before) <= ROUNDING


def test_a_gain_that_is_computed_stays_behind_the_norm(
    trace: Callable[..., FxGraph], text: Callable[[FxGraph], str], run: Any, difference: Any
) -> None:
    """Gemma's gain is 1 + w: a product with no parameter, which reads what the first rewrite replaces."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)) * (1.0 + m.gain)  # type: ignore[no-any-return]

    graph = trace(forward, (2, 5, 4), gain=gain())
    before = run(graph, x=X)
    RecogniseNorms()(graph, check=True)
    assert (
        text(graph)
        == """\
rms_norm_1: 4 = rms_norm(x, eps=0.001)
add_1: 4 = add(gain[4], 1)
mul_1: 4 = mul(rms_norm_1, add_1)
return mul_1"""
    )
    assert difference(run(graph, x=X), before) <= ROUNDING


def test_gemma(tiny_graph: Any, tiny_batch: Any, run: Any, difference: Any) -> None:
    model, graph = tiny_graph("gemma")
    norms = [op for op in graph.ops if op.kind is Kind.RMS_NORM]
    assert len(norms) == sum(type(part).__name__ == "GemmaRMSNorm" for part in model.modules()) == 5
    batch = tiny_batch(3, 11, 4)
    with torch.no_grad():
        expected = model(**batch).logits
    # Two layers of float32 sums in another order.
    assert difference(run(graph, **batch), [expected]) <= 1e-5
