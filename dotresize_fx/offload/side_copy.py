"""What was copied on a stream of its own, beside what a GPU computes."""

from __future__ import annotations

import torch


def received(tensor: torch.Tensor, event: torch.cuda.Event) -> torch.Tensor:
    """The tensor, for what is queued from now on: it waits for ``event``, and its memory is not given away before."""
    computing = torch.cuda.current_stream(tensor.device)
    computing.wait_event(event)
    tensor.record_stream(computing)
    return tensor
