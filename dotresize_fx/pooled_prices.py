"""What a cut of one region alone costs an encoder, measured: the cosine that its pooled embeddings lose.

An encoder is used through the mean of its last states over a sequence. Errors of single tokens average out in it and
those that a whole sequence shares do not, which no sum over tokens tells apart: so each region's probe is put into a
run of the dense model of its own, from the region's reader to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from dotresize_fx.fidelity import Inputs, pooled
from dotresize_fx.fx_form.execution import Environment, Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import token_rows
from dotresize_fx.region_inputs import RegionInputs


class Probe(Protocol):
    """One region cut: ``weights`` stand in for its writers', or ``error`` gives the change of its reader's output."""

    inputs: RegionInputs
    output: torch.fx.Node
    weights: dict[torch.fx.Node, torch.Tensor]

    def error(self, values: Mapping[torch.fx.Node, torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
        """(tokens, out), of real tokens."""


def pooled_prices(
    graph: FxGraph,
    probes: Sequence[Probe],
    batches: Sequence[Inputs],
    advanced: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Region name -> mean over sequences of 1 - cos(dense embedding, embedding with the region cut alone).

    Embeddings are pooled as :func:`dotresize_fx.fidelity.pooled` does. The mean of a probe's error over all tokens is
    left out: the reader's bias takes it. All batches are run side by side. ``advanced`` is called once a batch.
    """
    execution = Execution(graph)
    environments = [execution.start(batch) for batch in batches]
    last, result, position = len(execution.nodes), execution.results[0], 0

    def to_end(environment: Environment, start: int) -> torch.Tensor:
        return execution.run(environment, start, last, keep=[result])[result]

    cut: dict[str, list[torch.Tensor]] = {}
    firsts = [min(execution.index[graph.node(op.name)] for op in probe.inputs.writers) for probe in probes]
    for first, probe in sorted(zip(firsts, probes, strict=True), key=lambda pair: pair[0]):
        for environment in environments:
            execution.run(environment, position, first)
        position, stop = first, execution.index[probe.output] + 1
        keep = [node for node in (probe.inputs.hidden, probe.output) if node is not None]
        ahead = [dict(environment) for environment in environments]
        values = [execution.run(environment, position, stop, keep=keep) for environment in ahead]
        errors = []
        for environment, value, batch in zip(environments, values, batches, strict=True):
            mask = batch.get("attention_mask")
            if not probe.weights:
                errors.append(probe.error(value, mask))
                continue
            changed = execution.run(dict(environment), position, stop, keep=[probe.output], parameters=probe.weights)
            errors.append(token_rows(changed[probe.output] - value[probe.output], mask))
        offset = torch.cat(errors).mean(0)
        cut[probe.inputs.region.name] = []
        for environment, value, error, batch in zip(ahead, values, errors, batches, strict=True):
            environment[probe.output] = _added(value[probe.output], error - offset, batch.get("attention_mask"))
            cut[probe.inputs.region.name].append(pooled(to_end(environment, stop), batch))
    dense = []
    for environment, batch in zip(environments, batches, strict=True):
        dense.append(pooled(to_end(environment, position), batch))
        advanced()
    return {name: _lost(torch.cat(dense), torch.cat(embeddings)) for name, embeddings in cut.items()}


def _added(output: torch.Tensor, error: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """``output`` (batch, length, out), or with leading dimensions joined, and the rows of its real tokens' error."""
    rows = output.reshape(-1, output.shape[-1]).clone()
    if mask is None or len(rows) != mask.numel():
        rows += error
    else:
        rows[mask.reshape(-1).bool()] += error
    return rows.reshape(output.shape)


def _lost(dense: torch.Tensor, cut: torch.Tensor) -> float:
    """In float64: of nearly equal directions, float32 leaves no more than rounding."""
    cosines = torch.nn.functional.cosine_similarity(dense.double(), cut.double(), dim=-1)
    return max(0.0, float((1 - cosines).mean()))
