"""What each block puts out for the same tokens, and how far it turns the stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dotresize_fx.fidelity import Inputs
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import padding_mask, token_rows

# Tokens whose features are kept: the diffusion map takes an eigendecomposition of so many rows a block.
ROWS = 768


@dataclass(frozen=True)
class DepthStatistics:
    """``features``: (rows, width) float64 of each state, the same tokens in each.

    ``influences``: of each block 1 - mean cosine of the stream before and behind it, over all tokens (Men et al. 2024,
    "ShortGPT", section 3).
    """

    features: tuple[torch.Tensor, ...]
    influences: tuple[float, ...]


def depth_statistics(
    graph: FxGraph,
    states: Sequence[str],
    batches: Sequence[Inputs],
    *,
    rows: int = ROWS,
    seed: int = 0,
    advanced: Callable[[], None] = lambda: None,
) -> DepthStatistics:
    """Run the batches; ``states`` are the stream before the first block and behind each, in order.

    Tokens are drawn at random, as many of each batch as there are. ``advanced`` is called once a batch.
    """
    execution = Execution(graph)
    nodes = [graph.node(name) for name in states]
    stop = max(execution.position(node) for node in nodes) + 1
    generator = torch.Generator().manual_seed(seed)
    share = -(-rows // len(batches))
    kept: list[list[torch.Tensor]] = [[] for _ in states]
    cosines, tokens = [0.0] * (len(states) - 1), 0
    for batch in batches:
        mask, environment, position = padding_mask(batch), execution.start(batch), 0
        before, chosen = None, torch.zeros(0)
        for i, node in enumerate(nodes):
            end = min(stop, max(position, execution.position(node) + 1))
            found = token_rows(execution.run(environment, position, end, keep=[node])[node], mask)
            position = end
            if before is None:
                chosen = torch.randperm(len(found), generator=generator)[:share].to(found.device)
                tokens += len(found)
            else:
                cosines[i - 1] += float(torch.nn.functional.cosine_similarity(before, found).double().sum())
            kept[i].append(found[chosen].double())
            before = found
        advanced()
    features = tuple(torch.cat(parts)[:rows] for parts in kept)
    return DepthStatistics(features, tuple(1 - cosine / tokens for cosine in cosines))
