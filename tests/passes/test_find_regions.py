"""find_regions: every width with its ends and its symmetry, and a reason for every linear that has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.regions import Region, RegionKind, Symmetry


def linears(**sizes: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*size) for name, size in sizes.items()}


FFN = {"gate": (4, 8), "up": (4, 8), "other": (4, 8), "down": (8, 4)}


def only_ffn(graph: FxGraph) -> Region:
    (region,) = find_regions(graph).of_kind("ffn")
    return region


def test_a_transformer_block(trace: Callable[..., FxGraph], text: Callable[[FxGraph], str]) -> None:
    def forward(m: Any, ids: torch.Tensor) -> torch.Tensor:
        stream = m.table(ids)
        hidden = m.norm(stream)
        stream = stream + m.down(F.silu(m.gate(hidden)) * m.up(hidden))
        return m.head(m.final(stream))

    sizes = {"gate": (4, 8), "up": (4, 8), "down": (8, 4), "head": (4, 7)}
    graph = trace(
        forward,
        (2, 3),
        dtype=torch.int64,
        table=nn.Embedding(7, 4),
        norm=nn.RMSNorm(4, eps=1e-6),
        final=nn.RMSNorm(4, eps=1e-6),
        **linears(**sizes),
    )
    before = text(graph)
    assert (
        before
        == """\
embedding_1: 4 = embedding(ids, table.weight[7,4])
rms_norm_1: 4 = rms_norm(embedding_1, norm.weight[4], eps=1e-06)
linear_1: 8 = linear(rms_norm_1, gate.weight[8,4], gate.bias[8])
silu_1: 8 = silu(linear_1)
linear_2: 8 = linear(rms_norm_1, up.weight[8,4], up.bias[8])
mul_1: 8 = mul(silu_1, linear_2)
linear_3: 4 = linear(mul_1, down.weight[4,8], down.bias[4])
add_1: 4 = add(embedding_1, linear_3)
rms_norm_2: 4 = rms_norm(add_1, final.weight[4], eps=1e-06)
linear_4: 7 = linear(rms_norm_2, head.weight[7,4], head.bias[7])
return linear_4"""
    )
    report = find_regions(graph)
    assert text(graph) == before
    stream, ffn = report.regions
    assert (stream.kind, stream.symmetry, stream.width) == (RegionKind.RESIDUAL, Symmetry.ORTHOGONAL, 4)
    assert stream.writers == ("embedding", "linear_2")
    assert stream.readers == stream.normed_readers == ("linear", "linear_1", "linear_3")
    assert stream.norms == ("rms_norm", "rms_norm_1")
    assert stream.description == "residual width 4: 2 writers, 3 readers, 2 norms between"
    assert (ffn.kind, ffn.symmetry, ffn.width) == (RegionKind.FFN, Symmetry.PERMUTATION, 8)
    assert (ffn.writers, ffn.readers) == (("linear", "linear_1"), ("linear_2",))
    assert (ffn.linear_branch, ffn.positive_scale) == (("linear_1",), False)
    assert ffn.target == "add"
    rows = {row.parameter: (row.reads, row.writes, row.reason) for row in report.linears}
    assert rows == {
        "gate.weight": ("residual stream", ffn.name, ""),
        "up.weight": ("residual stream", ffn.name, ""),
        "down.weight": (ffn.name, "residual stream", ""),
        "head.weight": ("residual stream", None, "output: it is an output of the graph"),
    }
    assert all(row.matched for row in report.linears)


def test_nothing_but_linears_between_is_plain(trace: Callable[..., FxGraph]) -> None:
    graph = trace(lambda m, x: m.down(m.up(x) * 0.5), (2, 4), **linears(up=(4, 8), down=(8, 4)))
    (region,) = find_regions(graph).regions
    assert (region.kind, region.symmetry) == (RegionKind.PLAIN, Symmetry.GENERAL_LINEAR)


GATES: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], tuple[str, ...]]] = {
    "gated": (lambda m, x: F.silu(m.gate(x)) * m.up(x), ("linear_1",)),
    "gated, other order": (lambda m, x: m.gate(x) * F.gelu(m.up(x)), ("linear",)),
    "scaled branch": (lambda m, x: F.silu(m.gate(x)) * (m.up(x) * 2), ("linear_1",)),
    "bilinear": (lambda m, x: m.gate(x) * m.up(x), ("linear",)),
    "no branch is linear": (lambda m, x: F.silu(m.gate(x)) * torch.tanh(m.up(x)), ()),
    "gelu, no product": (lambda m, x: F.gelu(m.up(x)), ()),
    "squared": (lambda m, x: torch.square(m.up(x)), ()),
    "nonlinearity behind the product": (lambda m, x: torch.tanh(F.silu(m.gate(x)) * m.up(x)), ()),
    "added to behind the product": (lambda m, x: F.silu(m.gate(x)) * m.up(x) + m.other(x), ()),
    "branch used twice": (lambda m, x: F.silu(m.gate(x)) * (u := m.up(x)) + u, ()),
    "scaled branch used twice": (lambda m, x: F.silu(m.gate(x)) * (u := m.up(x) * 2) + u, ()),
    "branch that feeds the gate": (lambda m, x: F.silu(u := m.up(x) * 2) * u, ()),
    "two products": (lambda m, x: F.silu(m.gate(x)) * m.up(x) * m.other(x), ("linear_2",)),
    "silu spelled out": (lambda m, x: (g := m.gate(x)) * torch.sigmoid(g) * m.up(x), ("linear_1",)),
    "silu spelled out, no gate": (lambda m, x: (u := m.up(x)) * torch.sigmoid(u), ()),
}


@pytest.mark.parametrize("name", GATES)
def test_the_linear_branch_of_a_gate(trace: Callable[..., FxGraph], name: str) -> None:
    hidden, branch = GATES[name]
    region = only_ffn(trace(lambda m, x: m.down(hidden(m, x)), (2, 4), **linears(**FFN)))
    assert region.linear_branch == branch
    assert not region.positive_scale


FUNCTIONS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], bool]] = {
    "relu": (lambda m, x: torch.relu(m.up(x)), True),
    "relu of a multiple": (lambda m, x: torch.relu(m.up(x) * 3), True),
    "relu beside a linear": (lambda m, x: torch.relu(m.up(x)) + m.gate(x), True),
    "gelu": (lambda m, x: F.gelu(m.up(x)), False),
    "relu6": (lambda m, x: F.relu6(m.up(x)), False),
    "relu of a shifted number": (lambda m, x: torch.relu(m.up(x) + 1), False),
    "relu squared": (lambda m, x: torch.relu(m.up(x)).square(), False),
    "relu gate": (lambda m, x: torch.relu(m.gate(x)) * m.up(x), False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_positive_scales_pass_relu_alone(trace: Callable[..., FxGraph], name: str) -> None:
    hidden, passes = FUNCTIONS[name]
    assert only_ffn(trace(lambda m, x: m.down(hidden(m, x)), (2, 4), **linears(**FFN))).positive_scale == passes


def test_the_target_is_the_stream_behind_all_additions(trace: Callable[..., FxGraph]) -> None:
    def parallel(m: Any, x: torch.Tensor) -> torch.Tensor:
        return x + m.other(x)[:, :4] + m.down(torch.relu(m.up(x)))

    assert only_ffn(trace(parallel, (2, 4), **linears(**FFN))).target == "add_1"


def test_a_subtracted_sublayer_is_its_own_target(trace: Callable[..., FxGraph]) -> None:
    graph = trace(lambda m, x: x - m.down(torch.relu(m.up(x))), (2, 4), **linears(up=(4, 8), down=(8, 4)))
    assert only_ffn(graph).target == "linear_1"


def test_names_come_from_the_modules_and_are_unique(trace: Callable[..., FxGraph]) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        for layer in (m.block.first, m.block.second):
            x = x + layer[1](torch.relu(layer[0](x)))
        return m.down(F.gelu(m.up(x)))

    def layer() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))

    block = nn.ModuleDict({"first": layer(), "second": layer()})
    graph = trace(forward, (2, 4), block=block, up=nn.Linear(4, 8), down=nn.Linear(8, 4))
    names = [region.name for region in find_regions(graph).of_kind("ffn")]
    assert names[:2] == ["block.first", "block.second"]
    assert len(set(names)) == 3


def test_a_linear_that_nothing_matches_says_why_on_both_sides(trace: Callable[..., FxGraph]) -> None:
    graph = trace(lambda m, x: m.up(x).softmax(-1), (2, 4), up=nn.Linear(4, 8))
    (row,) = find_regions(graph).linears
    assert not row.matched
    assert row.shape == (8, 4)
    assert row.reason == (
        "input: it comes from an input of the graph; output: it goes into softmax.int, which is not understood"
    )


def test_a_square_is_no_scale_of_rows(trace: Callable[..., FxGraph]) -> None:
    """A product of a value with itself has one input, and mixes with nothing but permutations."""
    graph = trace(lambda m, x: m.down((h := torch.relu(m.up(x))) * h), (2, 4), up=nn.Linear(4, 8), down=nn.Linear(8, 4))
    (region,) = find_regions(graph).of_kind("ffn")
    assert region.symmetry is Symmetry.PERMUTATION
    assert not region.positive_scale
