"""Plans that choose their own targets."""

from __future__ import annotations

import torch

from dotresize_fx.transport.sinkhorn import sinkhorn

# In units of the cost, a share between 0 and 1.
EPSILON = 0.05
# In each the plan's own target marginal becomes the next one's reference.
ROUNDS = 30
# Above 1: of targets that serve equally well one is left in the end.
SHARPENING = 1.05


def chosen_mass(cost: torch.Tensor, mass: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    """(n,): what arrives at each of n when the plan chooses its target marginal.

    Minimise <C, P> + epsilon KL(P | a b.T) over plans P with rows summing to a, and over b: the rate-distortion
    problem, whose best b is P's own column sums, and sparse (Blahut 1972, "Computation of channel capacity and
    rate-distortion functions", by alternating updates; here from b in proportion to a, and each raised to
    SHARPENING, since equal targets would share for ever). cost: (n, n). mass: a, (n,), not all zero.
    """
    arriving = mass / mass.sum()
    for _ in range(ROUNDS):
        plan = sinkhorn(cost, mass, arriving, epsilon=epsilon, target_relaxation=0.0, tolerance=1e-6, max_iterations=5)
        arriving = plan.plan.sum(0) ** SHARPENING
        arriving = arriving / arriving.sum()
    return arriving
