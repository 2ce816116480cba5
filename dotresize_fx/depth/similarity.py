"""How alike two blocks are: the mutual information of their embeddings over the root of the entropies' product.

MKA (arXiv 2406.16330) calls it the normalised pairwise information bottleneck. How it estimates entropies was not to be
had in full; here each coordinate falls into equally filled bins, which keeps the measure between 0 and 1, one for
embeddings that order the tokens alike, and blind to signs: a reconstruction.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from dotresize_fx.depth.diffusion_map import diffusion_map
from dotresize_fx.errors import CalibrationError

BINS = 8
# Rows a pair of bins that a chance of independent coordinates is told from more by.
LEAST_ROWS = 4 * BINS * BINS


def neighbour_similarities(features: Sequence[torch.Tensor]) -> list[float]:
    """Of each block and the next, from 0 to 1; features: (rows, width) of each, the same rows.

    Raises:
        CalibrationError: too few rows to estimate mutual information from.
    """
    if len(features[0]) < LEAST_ROWS:
        raise CalibrationError(
            f"{len(features[0])} calibration tokens say too little of how alike blocks are: their mutual information "
            f"takes at least {LEAST_ROWS}; give more with --calibration-tokens"
        )
    embedded = [diffusion_map(part) for part in features]
    return [similarity(a, b) for a, b in itertools.pairwise(embedded)]


def similarity(first: torch.Tensor, second: torch.Tensor) -> float:
    """I(a; b) / sqrt(H(a) H(b)), a mean over coordinates; both (rows, coordinates)."""
    parts = [_normalised(a, b) for a, b in zip(first.T, second.T, strict=True)]
    return sum(parts) / len(parts)


def _normalised(first: torch.Tensor, second: torch.Tensor) -> float:
    a, b = _binned(first), _binned(second)
    joint = torch.bincount(a * BINS + b, minlength=BINS * BINS).double().view(BINS, BINS) / len(a)
    entropies = [_entropy(joint.sum(axis)) for axis in (1, 0)]
    information = sum(entropies) - _entropy(joint.flatten())
    return max(0.0, information / math.sqrt(entropies[0] * entropies[1]))


def _binned(values: torch.Tensor) -> torch.Tensor:
    """(rows,) int64: the bin of each, all bins equally full; a coordinate turned round has the same, in reverse."""
    ranks = values.argsort(stable=True).argsort()
    return ranks * BINS // len(values)


def _entropy(chances: torch.Tensor) -> float:
    return float(-torch.special.xlogy(chances, chances).sum())
