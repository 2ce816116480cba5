"""Greedy decoding in ONNX Runtime, by a graph with a cache: the prompt in one run, then a run a token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dotresize_fx.cache_names import PAST, POSITIONS
from dotresize_fx.export.onnx_session import OnnxModel

Ints = np.ndarray[Any, np.dtype[np.int64]]


def greedy(model: OnnxModel, ids: Ints, mask: Ints) -> Iterator[Ints]:
    """The likeliest next token of every sequence, (batch,), over and over.

    ``ids`` and ``mask`` (batch, length) are the prompts, padded on the left. Keys and values stay in the runtime.

    Raises:
        OnnxRuntimeError: a run failed.
    """
    given = model.values(model.at_start({"input_ids": ids, "attention_mask": mask}))
    while True:
        logits, *present = model.run_values(given)
        chosen: Ints = logits.numpy()[:, -1].argmax(-1).astype(np.int64)
        yield chosen
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], 1)
        tokens = {"input_ids": chosen[:, None], "attention_mask": mask}
        if POSITIONS in model.input_names:
            tokens[POSITIONS] = mask.sum(-1, keepdims=True) - 1
        names = (name.replace("present", PAST, 1) for name in model.output_names[1:])
        given = model.values(tokens) | dict(zip(names, present, strict=True))
