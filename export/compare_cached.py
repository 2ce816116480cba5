"""A program with a cache, held against its model: in one go, and behind a past of its own; each weight is read once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from dotresize_fx.errors import BadWeightsError, CaptureError
from dotresize_fx.export.cached_runs import behind, prompt_inputs
from dotresize_fx.export.capture import CAPTURE_TOLERANCE, Captured
from dotresize_fx.fx_form.execution import Environment, Execution
from dotresize_fx.offload.lazy_tensor import PIECE

# (tokens of the past, new tokens) of the sample's; a single new token is tried in a batch of one.
SPLITS = ((0, 16), (0, 1), (9, 7), (15, 1))


@dataclass
class _Split:
    """``length`` new tokens of the sample behind ``past`` of them, in a batch of one where it is one token."""

    past: int
    length: int
    environment: Environment = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first, self.stop = 1 if self.length == 1 else 0, self.past + self.length

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of what is (batch, length, ...) of the whole sample, the rows and new tokens that are this one's."""
        return tensor[self.first :, self.past : self.stop]


@torch.no_grad()
def compare_cached(model: Any, captured: Captured) -> None:
    """The model's logits, once without a cache, against the program's: a decoder's logits do not depend on what stands
    behind or in other rows.

    Raises:
        CaptureError: they differ, or the program cannot be run so; the message says how.
    """
    assert captured.cache is not None
    ids, mask = captured.sample["input_ids"], captured.sample["attention_mask"]
    whole = prompt_inputs(captured.cache, ids, mask)
    try:
        expected = model(**whole)[0]
    except BadWeightsError:
        raise
    except Exception as error:  # positions that the model cannot be given
        raise _differs(_Split(*SPLITS[0])) from error
    splits = [_Split(past, length) for past, length in SPLITS]
    largest = expected[mask.bool()].abs().max()
    for split, found in zip(splits, _run(captured, splits, ids, mask), strict=True):
        wanted, real = split.part(expected), split.part(mask).bool()
        if found.shape != wanted.shape or not (found - wanted)[real].abs().max() <= CAPTURE_TOLERANCE * largest:
            raise _differs(split)


def _run(captured: Captured, splits: list[_Split], ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The program's logits for each of these, (batch, length, vocabulary), the first of which is the whole sample.

    They run side by side, a piece after the other: what a piece makes of the cache is the past of the others in it.
    """
    graph = captured.graph
    execution = Execution(graph, caches=True)
    logits, *_ = execution.results
    pasts = {graph.node(name): graph.node(past) for name, past in graph.caches.items()}
    for split in splits:
        inputs = prompt_inputs(captured.cache, ids[split.first :, : split.stop], mask[split.first :, : split.stop])
        split.environment = execution.start(behind(inputs, split.past))
        for node in pasts.values():  # of its length; the numbers come with the piece that reads them
            start = split.environment[node]
            split.environment[node] = start.new_zeros(*start.shape[:2], split.past, start.shape[3])
    start = 0
    large = [node for node in execution.parameters if execution.stored(node).nbytes > PIECE]
    for stop in execution.pieces(start, len(execution.nodes), PIECE):
        weights = execution.read_for_good(start, stop, large)
        made: dict[torch.fx.Node, torch.Tensor] = {}  # of the whole one's cache, in this piece
        for split in splits:
            if split.past:
                past = {pasts[node]: value[split.first :, :, : split.past] for node, value in made.items()}
                split.environment.update(past)
            try:
                found = execution.run(split.environment, start, stop, keep=pasts, parameters=weights)
            except BadWeightsError:
                raise
            except Exception as error:  # sizes that tracing took for constants
                raise _differs(split) from error
            if split is splits[0]:
                made = {node: value for node, value in found.items() if execution.index[node] >= start}
        weights.clear()  # before the next ones are read
        start = stop
    return [split.environment[logits] for split in splits]


def _differs(split: _Split) -> CaptureError:
    return CaptureError(
        f"with a past of {split.past} and {split.length} new tokens the captured program computes something else"
    )
