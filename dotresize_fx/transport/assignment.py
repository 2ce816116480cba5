"""One-to-one matching by optimal transport: an entropic plan of little entropy, rounded to a permutation."""

from __future__ import annotations

import torch

from dotresize_fx.transport.sinkhorn import sinkhorn

# As a share of the similarities' spread. The plan only has to lean the right way before it is rounded.
EPSILON = 0.02
TOLERANCE, ITERATIONS = 1e-3, 1000


def assign(similarity: torch.Tensor) -> torch.Tensor:
    """(n,) int64: for each row the column it is matched with, each column once, the sum of similarities large.

    similarity: (n, n). With equal masses the optimal plan without entropy is a permutation (Birkhoff), which the plan
    comes near; of the pairs that choose each other the strongest are taken first.
    """
    spread = float((similarity.amax() - similarity.amin()).clamp_min(torch.finfo(similarity.dtype).tiny))
    cost = (similarity.amax() - similarity).double() / spread
    plan = sinkhorn(cost, epsilon=EPSILON, tolerance=TOLERANCE, max_iterations=ITERATIONS).plan
    # Within what entropy spread out the similarities themselves decide.
    wish = plan.clamp_min(torch.finfo(torch.float64).tiny).log() - cost / EPSILON
    found = torch.full((len(wish),), -1, dtype=torch.int64, device=wish.device)
    while bool((found < 0).any()):
        best = wish.argmax(1)
        rows = (found < 0).nonzero().flatten()
        mutual = rows[wish.argmax(0)[best[rows]] == rows]
        found[mutual] = best[mutual]
        wish[mutual] = wish[:, best[mutual]] = -torch.inf
    return found
