"""How much the model's answers suffer from each rank of each linear, from a few runs of the dense model.

As of widths (sensitivity.py): a curve has the shape of the error that the linear's outputs are left with, and the
height of one probe, the dense model run on with that linear alone of a lower rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dotresize_fx.activation_stream import ActivationStream
from dotresize_fx.fidelity import Inputs
from dotresize_fx.fx_form.execution import Environment, Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import GramAccumulator, padding_mask, token_rows, with_ones
from dotresize_fx.graph import Op
from dotresize_fx.offload.lazy_tensor import in_memory
from dotresize_fx.prices import price_probes
from dotresize_fx.rank.budget import break_even
from dotresize_fx.rank.factors import Factors, output_spectrum, solve_reduced_rank
from dotresize_fx.sensitivity import priced, shaping_and_pricing

# The share of the rank at which nothing is saved yet that a probe keeps.
PROBED = 0.6


class RankProbe:
    """One linear of a lower rank, in a run of the dense model."""

    rarely = False

    def __init__(self, graph: FxGraph, op: Op, factors: Factors) -> None:
        self.name, self.node, self.source = op.name, graph.node(op.name), graph.node(op.inputs[0].name)
        self.departs = [self.node]
        dtype = graph.weight(op).dtype
        self.first, self.second = factors.first.to(dtype), factors.second.to(dtype)
        self.bias = None if factors.bias is None else factors.bias.to(dtype)

    def depart(self, execution: Execution, environment: Environment, start: int) -> int:
        """Put it in place of the linear, at ``start``, up to which ``environment`` was run; returns what is behind."""
        linear = torch.nn.functional.linear
        x = in_memory(environment[self.source]).to(self.first.dtype)
        put_out = linear(linear(x, self.first), self.second, self.bias)
        execution.run(environment, start, start + 1)
        environment[self.node] = put_out
        return start + 1


def measure_rank_curves(
    graph: FxGraph,
    names: Sequence[str],
    batches: Sequence[Inputs],
    *,
    task: str = "decoder",
    advanced: Callable[[], None] = lambda: None,
) -> dict[str, torch.Tensor]:
    """Op name -> (min(rows, columns) + 1,) float64 on the CPU: the predicted loss at each rank, in the unit that
    :func:`dotresize_fx.sensitivity.measure_curves` has. ``advanced`` is called once a linear and once a batch.
    """
    shaping, pricing = shaping_and_pricing(graph, batches, task)
    masks = [padding_mask(batch) for batch in shaping]
    execution = Execution(graph)
    stream = ActivationStream(execution, [execution.start(batch) for batch in shaping])
    sources: dict[str, list[Op]] = {}
    for op in sorted(map(graph.op, names), key=lambda one: graph.positions[one.name]):
        sources.setdefault(op.inputs[0].name, []).append(op)
    curves, probes = {}, []
    for source, ops in sources.items():
        node = graph.node(source)
        stream.advance(max(stream.position, execution.position(node) + 1))
        sums = GramAccumulator()
        for environment, mask in zip(stream.environments, masks, strict=True):
            sums.add(with_ones(token_rows(environment[node], mask)))
        for op in ops:
            weight = graph.weight(op)
            spectrum = output_spectrum(weight, sums)
            curves[op.name] = torch.cat([spectrum.flip(0).cumsum(0).flip(0), spectrum.new_zeros(1)])
            sums.cross = {"missing": sums.gram.new_zeros(len(sums.gram), len(weight))}
            probes.append(RankProbe(graph, op, solve_reduced_rank(weight, graph.bias(op), sums, probed_rank(weight))))
            advanced()
    prices = price_probes(graph, probes, pricing, task, advanced)
    return {
        name: priced(curve, probed_rank(graph.weight(graph.op(name))), prices[name]) for name, curve in curves.items()
    }


def probed_rank(weight: torch.Tensor) -> int:
    """The rank at which a linear's curve is priced."""
    return max(1, round(PROBED * break_even(*weight.shape)))
