"""What the tiny models read: random token ids, pixels, or what else a type takes for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny_models import IMAGE_TOKEN, IMAGE_TOKENS, VOCABULARY, Architecture

from dotresize_fx.fidelity import Inputs

SIDE, PATCH = 32, 8
ROWS, LENGTH = 3, 24  # which tracing does not see


def batches(architecture: Architecture, count: int, seed: int, rows: int = ROWS, length: int = LENGTH) -> list[Inputs]:
    """Random token ids (rows, length), one row of each padded; or what a model of images reads, ``rows`` of each."""
    generator = torch.Generator().manual_seed(seed)
    make = IMAGES.get(architecture.model_type, pixels) if architecture.task == "image" else None
    if make is not None:
        return [make(rows, generator) for _ in range(count)]
    found = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, :7] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def pixels(rows: int, generator: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(rows, 3, SIDE, SIDE, generator=generator)}


def _colours(rows: int, generator: torch.Generator) -> Inputs:
    """ImageGPT reads pixels as ids of a palette."""
    return {"input_ids": torch.randint(0, VOCABULARY - 1, (rows, 16), generator=generator)}


def _patches(rows: int, generator: torch.Generator) -> Inputs:
    """SigLIP 2 reads patches of images of any shape."""
    side = SIDE // PATCH
    return {
        "pixel_values": torch.randn(rows, side * side, 3 * PATCH * PATCH, generator=generator),
        "pixel_attention_mask": torch.ones(rows, side * side, dtype=torch.int64),
        "spatial_shapes": torch.full((rows, 2), side),
    }


def _asked(rows: int, generator: torch.Generator) -> Inputs:
    """ShieldGemma 2 reads an image and a question about it."""
    ids = torch.randint(3, IMAGE_TOKEN, (rows, 16), generator=generator)
    ids[:, 2 : 2 + IMAGE_TOKENS] = IMAGE_TOKEN
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels(rows, generator)}


IMAGES: dict[str, Callable[[int, torch.Generator], Inputs]] = {
    "imagegpt": _colours,
    "siglip2": _patches,
    "shieldgemma2": _asked,
}
