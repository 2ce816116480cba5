"""close_dimension: a width is followed to all its ends, or the reason why it cannot be is said in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Graph, Value
from dotresize_fx.passes.close_dimension import ClosedDimension, Escape, close_dimension
from dotresize_fx.passes.drop_no_ops import DropNoOps

Forward = Callable[..., torch.Tensor]


def written_by(graph: Graph, parameter: str) -> Value:
    """The output of the first op whose weight has this name."""
    return next(op.output for op in graph.ops if op.weight is not None and graph.parameter_name(op.weight) == parameter)


def parts(*names: str, **sizes: tuple[int, int]) -> dict[str, nn.Module]:
    """Linears of width 4 -> 8 for the names given, or of the sizes given."""
    return {name: nn.Linear(*sizes.get(name, (4, 8))) for name in (*names, *sizes)}


def ends(graph: Graph, closed: ClosedDimension) -> dict[str, list[str]]:
    """Parameter names of writers and readers, kinds or functions of what is crossed."""

    def names(ops: list[Any]) -> list[str]:
        return [graph.parameter_name(op.weight).removesuffix(".weight") for op in ops]

    crossed = [op.function or op.kind.value for op in closed.crossed]
    return {"writers": names(closed.writers), "readers": names(closed.readers), "crossed": crossed}


def test_a_gate(trace: Callable[..., FxGraph]) -> None:
    graph = trace(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), (2, 4), **parts("gate", "up", down=(8, 4)))
    for name in ("gate.weight", "up.weight"):
        closed = close_dimension(graph, written_by(graph, name))
        assert closed.width == 8
        assert ends(graph, closed) == {
            "writers": ["gate", "up"],
            "readers": ["down"],
            "crossed": ["silu", "mul"],
        }


def test_a_value_with_several_readers(trace: Callable[..., FxGraph]) -> None:
    graph = trace(
        lambda m, x: torch.cat([m.a(torch.relu(m.up(x))), m.b(m.up(x) * 2)], -1),
        (2, 4),
        **parts("up", a=(8, 3), b=(8, 3)),
    )
    closed = close_dimension(graph, written_by(graph, "up.weight"))
    # The weight is used by two linears: its outputs are one dimension, with everything behind both of them.
    assert ends(graph, closed)["writers"] == ["up", "up"]
    assert ends(graph, closed)["readers"] == ["a", "b"]


def test_a_norm_has_two_sides(trace: Callable[..., FxGraph]) -> None:
    graph = trace(lambda m, x: m.down(m.norm(m.up(x))), (2, 4), norm=nn.RMSNorm(8), **parts("up", down=(8, 4)))
    before, after = written_by(graph, "up.weight"), written_by(graph, "norm.weight")
    for start in (before, after):
        closed = close_dimension(graph, start)
        assert closed.values == {before, after}
        assert closed.normed == {after}
        assert [op.name for op in closed.norms] == ["rms_norm"]


ESCAPES: dict[str, tuple[Forward, str]] = {
    "an output": (lambda m, x: m.up(x), "it is an output of the graph"),
    "an output beside a reader": (lambda m, x: (h := m.up(x), m.down(h)), "it is an output of the graph"),
    "heads": (lambda m, x: m.down(m.up(x).view(-1, 4, 2).relu().view(-1, 8)), "split into heads or reshaped"),
    "softmax": (lambda m, x: m.down(m.up(x).softmax(-1)), "goes into softmax"),
    "a mean": (lambda m, x: m.up(x).mean(-1, keepdim=True) * m.down(x @ m.square), "a mean is taken over it"),
    "a parameter": (lambda m, x: m.down(m.up(x) * m.gain), "a parameter is multiplied with it"),
    "a parameter used twice": (lambda m, x: m.down(m.up(x) + m.gain) + m.gain.sum(), "is used elsewhere too"),
    "an input": (lambda m, x: m.down(m.up(x) + F.pad(x, (0, 4))), "it comes from pad"),
    "a sum of numbers": (lambda m, x: m.down(m.up(x) + x[:, :1]), "one number is added to the whole width"),
    "a cumulative sum": (lambda m, x: m.down(m.up(x).cumsum(-1)), "goes into cumsum"),
    "rounding to integers": (lambda m, x: m.down(m.up(x).to(torch.int32).to(torch.float32)), "goes into to"),
    "a slice of itself": (lambda m, x: m.front(m.up(x)[:, :4]) + m.down(m.up(x)), "goes into slice"),
    "a nonlinearity and a norm": (lambda m, x: m.down(m.norm(F.relu(m.up(x)))), "a nonlinearity and a norm"),
    "a weight used otherwise": (lambda m, x: m.down(m.up(x)) + m.up.weight.sum(), "weight is also used by sum"),
    "post-norm": (lambda m, x: m.down(m.norm(h := m.up(x)) + h), "sandwich norm"),
    "a norm that is read and added": (lambda m, x: m.down(h := m.norm(m.up(x))) + m.down(h + m.up(x)), "post-norm"),
    "two norms added": (lambda m, x: m.down(m.norm(h := m.up(x)) + m.other(h)), "sandwich norm"),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_escapes(trace: Callable[..., FxGraph], name: str) -> None:
    forward, reason = ESCAPES[name]
    graph = trace(
        forward,
        (2, 4),
        gain=nn.Parameter(torch.empty(8)),
        square=nn.Parameter(torch.empty(4, 8)),
        norm=nn.RMSNorm(8),
        other=nn.RMSNorm(8),
        **parts("up", down=(8, 4), front=(4, 4)),
    )
    DropNoOps()(graph)  # tracing leaves assertions behind, which read the values
    with pytest.raises(Escape, match=reason) as caught:
        close_dimension(graph, written_by(graph, "up.weight"))
    assert written_by(graph, "up.weight") in caught.value.values or "output" in reason


def test_nothing_reads_it(trace: Callable[..., FxGraph]) -> None:
    graph = trace(lambda m, x: (m.up(x), x + 1)[1], (2, 4), **parts("up"))
    with pytest.raises(Escape, match="nothing reads it"):
        close_dimension(graph, written_by(graph, "up.weight"))


def test_a_width_that_is_not_fixed(trace: Callable[..., FxGraph]) -> None:
    graph = trace(lambda m, x: torch.relu(x.t()), (2, 4))
    with pytest.raises(Escape, match="its size is not fixed"):
        close_dimension(graph, graph.ops[-1].output)


def test_nothing_is_changed(trace: Callable[..., FxGraph], text: Callable[[FxGraph], str]) -> None:
    graph = trace(lambda m, x: m.down(torch.relu(m.up(x))), (2, 4), **parts("up", down=(8, 4)))
    before = text(graph)
    close_dimension(graph, written_by(graph, "up.weight"))
    assert text(graph) == before
