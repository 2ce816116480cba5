"""How much the model's loss rises with what is cut from each region, without cutting and evaluating one by one.

Two passes over a few batches of the dense model. The first takes each region's Gram matrix and eliminates its neurons
to the end, which gives the squared output error after every one of them. The second takes gradients of the model's own
loss (labels sampled from the model itself, so that squared gradients are the Fisher information) with respect to the
stream behind each sublayer, which prices a unit of that error: to second order the loss rises by half the mean square
of gradient times error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dotresize_fx.execution import Environment, Execution
from dotresize_fx.fx_graph import FxGraph
from dotresize_fx.gram import GramAccumulator, token_rows
from dotresize_fx.regions import Region
from dotresize_fx.solvers.obs import damping, eliminate

Inputs = Mapping[str, torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Generator], torch.Tensor]

# The cut at which a region's errors are priced, and how many neurons at least are never planned away.
PRICED_SHARE = 0.3
KEPT_SHARE = 1 / 8


@dataclass(frozen=True)
class LossCurve:
    """rise: (m + 1,) float64, the predicted rise of the loss in nats a token after cutting 0, 1, ... m neurons."""

    rise: torch.Tensor


def loss_curves(
    graph: FxGraph,
    regions: Sequence[Region],
    batches: Sequence[Inputs],
    *,
    is_decoder: bool = True,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> dict[str, LossCurve]:
    """Region name -> predicted loss curve. ``graph`` is not changed; regions come in graph order, one reader each.

    ``is_decoder`` says that the first output is logits; ``step`` is called once a region and once a batch.
    """
    errors, changes = _error_curves(graph, regions, batches, step)
    loss = _sampled_loss if is_decoder else _probed_change
    prices = _prices(graph, regions, batches, changes, loss, seed, step)
    return {name: LossCurve(torch.cat([curve.new_zeros(1), prices[name] * curve])) for name, curve in errors.items()}


def _error_curves(
    graph: FxGraph, regions: Sequence[Region], batches: Sequence[Inputs], step: Callable[[], None]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Per region the squared output error after each elimination, and the reader's change (out, n) at PRICED_SHARE."""
    execution = Execution(graph)
    environments = [execution.start(batch) for batch in batches]
    position = 0
    errors: dict[str, torch.Tensor] = {}
    changes: dict[str, torch.Tensor] = {}
    for region in regions:
        reader = graph.op(region.readers[0])
        node = graph.node(reader.inputs[0].name)
        stop = execution.index[node] + 1
        total = GramAccumulator()
        for environment, batch in zip(environments, batches, strict=True):
            value = execution.run(environment, position, stop, keep=[node])[node]
            total.add(token_rows(value, batch.get("attention_mask")))
        position = stop
        gram, weight = total.gram / total.tokens, graph.weight(reader).double()
        found = eliminate(gram, weight, int(region.width * (1 - KEPT_SHARE)))
        errors[region.name] = found.error
        changes[region.name] = _change(gram, weight, found.order[: int(region.width * PRICED_SHARE)])
        step()
    return errors, changes


def _change(gram: torch.Tensor, weight: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """Old minus new reader weight (out, n) when the neurons ``gone`` are dropped and the rest refitted; float32."""
    kept = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    kept[gone] = False
    ridge = torch.diag(damping(gram)[kept])
    change = weight.clone()
    change[:, kept] -= torch.linalg.solve(gram[kept][:, kept] + ridge, gram[kept] @ weight.T).T
    return change.float()


def _prices(
    graph: FxGraph,
    regions: Sequence[Region],
    batches: Sequence[Inputs],
    changes: Mapping[str, torch.Tensor],
    loss: Loss,
    seed: int,
    step: Callable[[], None],
) -> dict[str, torch.Tensor]:
    """Per region, loss in nats a token per unit of squared output error a token."""
    execution = Execution(graph)
    generator = torch.Generator(device=next(iter(changes.values())).device).manual_seed(seed)
    rise = {region.name: torch.zeros((), dtype=torch.float64) for region in regions}
    size = dict(rise)
    targets = [graph.node(region.target) for region in regions]
    readers = [graph.node(graph.op(region.readers[0]).inputs[0].name) for region in regions]
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            values = _with_gradients(execution, one, targets, readers, lambda rows: loss(rows, generator))
            for region, target, reader in zip(regions, targets, readers, strict=True):
                gradient, hidden = values[target].grad, values[reader].detach()
                assert gradient is not None
                mask = one.get("attention_mask")
                slopes, errors = token_rows(gradient, mask), token_rows(hidden, mask) @ changes[region.name].T
                rise[region.name] += 0.5 * (slopes * errors).sum(1).double().square().sum().cpu()
                size[region.name] += errors.double().square().sum().cpu()
        step()
    return {name: (rise[name] / size[name].clamp_min(1e-300)).to(changes[name].device) for name in rise}


def _with_gradients(
    execution: Execution,
    batch: Inputs,
    targets: Sequence[torch.fx.Node],
    readers: Sequence[torch.fx.Node],
    loss: Callable[[torch.Tensor], torch.Tensor],
) -> Environment:
    """Values of targets and readers, with the gradients of the loss of the output's rows on the targets."""
    first = execution.index[targets[0]] + 1
    environment = execution.start(batch)
    kept = execution.run(environment, 0, first, keep=[targets[0], readers[0]])
    leaf = kept[targets[0]].detach().requires_grad_()
    environment[targets[0]] = kept[targets[0]] = leaf
    with torch.enable_grad():
        result = execution.results[0]
        wanted = [*targets[1:], *readers[1:], result]
        values = execution.run_with_gradients(environment, first, len(execution.nodes), keep=wanted)
        for node in targets[1:]:
            values[node].retain_grad()
        loss(token_rows(values[result], batch.get("attention_mask"))).backward()
    return {**kept, **values}


def _sampled_loss(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Summed over tokens: the loss on labels drawn from the model's own distribution."""
    with torch.no_grad():
        labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def _probed_change(states: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An encoder's output has no distribution: its product with Gaussian noise, in units of the output's deviation.

    Squares of its gradients are, on average, the squared change of the output.
    """
    noise = torch.randn(states.shape, generator=generator, device=states.device)
    return (states * noise).sum() / states.detach().std()
