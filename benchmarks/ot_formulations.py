"""Where transport could earn its place: each formulation is a pair, with transport and the same pipeline without it.

A member cuts regions of one kind. ``solvers`` are tried as the sweep tries them: of several, the one with the lowest
error on held-out calibration batches is taken. ``mix`` changes a sublayer's writers at full width before it is cut,
where no map of the region could say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from ot_heads import mix_values, solve_pairs
from ot_plans import chosen_mass

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.region_map import RegionMap, selection
from dotresize_fx.regions import Region, RegionKind
from dotresize_fx.solvers import SOLVERS, Solver
from dotresize_fx.solvers.dotresize import output_error
from dotresize_fx.solvers.magnitude import top
from dotresize_fx.solvers.obs import solve_obs
from dotresize_fx.transport.sinkhorn import sinkhorn

# In units of the cost, which lies between 0 and 1.
EPSILON = 0.02
# Tried, of what the plan brings to a writer's row.
SHARES = (0.5, 1.0)

# (region, statistics, width, names of the value writers) -> weights with a bias as last column, by op name
Mix = Callable[[Region, RegionStatistics, int, Sequence[str]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Member:
    """One side of a pair. ``entered``: its solvers want second moments of what the FFN's writers read."""

    kind: RegionKind
    solvers: tuple[tuple[str, Solver], ...]
    mix: Mix | None = None
    entered: bool = False


@dataclass(frozen=True)
class Formulation:
    """Names of two members of the same kind, and what the pair is about."""

    transport: str
    without: str
    about: str


def solve_norm(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
    """Keep the neurons of the largest contribution: activation norm times reader norm."""
    down = selection(top(statistics.activation_norm * statistics.reader_norm, width), region.width)
    return RegionMap(down, down.T)


def solve_semi_relaxed(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
    """Keep the neurons that most mass arrives at when a plan between all neurons is free to choose its targets.

    The mass is the mean square of what each neuron contributes, the cost the share of it that the best multiple of
    another does not give.
    """
    mass = statistics.gram.diagonal().clamp_min(0) * statistics.reader_norm.square()
    if width == region.width or float(mass.sum()) <= 0:
        return solve_obs(region, statistics, width)
    down = selection(top(chosen_mass(output_error(statistics.gram), mass / mass.sum()), width), region.width)
    return RegionMap(down, down.T)


def solve_recentred(region: Region, statistics: RegionStatistics, width: int, share: float) -> RegionMap:
    """OBS's support; rows of a gate product's linear branch move to the plan's barycentre, gates stay.

    A removed neuron i can live on in a kept one j as far as i's gate is a multiple of j's, and only along j's own
    reader column: of w_i a_i (u_i x) there remains s_ij w_j a_j (u_i x), with s_ij = (w_i . w_j / ||w_j||²) times the
    ratio of the gates. The cost is the share of i's output that this leaves out, 1 - cos²(w_i, w_j) cos²(gates), the
    mass i's contribution. Row j becomes u_j + share * sum_i P(j | i) s_ij u_i.
    """
    kept = solve_obs(region, statistics, width)
    support = kept.down.argmax(0)
    gone = kept.down.sum(1) == 0
    gates = [name for name in region.writers if name not in region.linear_branch]
    weight = statistics.reader_weight
    if not gone.any() or not region.linear_branch or len(gates) != 1 or weight is None:
        return kept
    tiny = torch.finfo(weight.dtype).tiny
    gate = statistics.written_gram(gates[0])
    size = gate.diagonal().clamp_min(tiny).sqrt()
    alike = (gate[gone][:, support] / (size[gone][:, None] * size[support])).clamp(0, 1)
    inner, length = weight[:, gone].T @ weight[:, support], weight.square().sum(0).clamp_min(tiny)
    cosine = inner / (length[gone][:, None] * length[support]).sqrt()
    mass = statistics.gram.diagonal()[gone].clamp_min(0) * length[gone]
    if float(mass.sum()) <= 0:
        return kept
    mass = mass / mass.sum()
    plan = sinkhorn(
        1 - (cosine * alike).square(),
        mass,
        epsilon=EPSILON,
        target_relaxation=0.0,
        tolerance=1e-6,
        max_iterations=5,
    ).plan
    scale = inner / length[support] * alike * size[gone][:, None] / size[support]
    branch = kept.down.clone()
    branch[gone] = share * plan / mass.clamp_min(tiny)[:, None] * scale
    return RegionMap(kept.down, branch_down=branch)


def _core(kind: RegionKind, name: str) -> Member:
    return Member(kind, ((name, SOLVERS[name]),))


def _pairs(**chosen: bool) -> Member:
    return Member(RegionKind.QUERY_KEY, (("pairs", partial(solve_pairs, **chosen)),))


_RECENTRED = tuple((f"recentred {share}", partial(solve_recentred, share=share)) for share in SHARES)

MEMBERS: dict[str, Member] = {
    "obs": _core(RegionKind.FFN, "obs"),
    "merged": _core(RegionKind.FFN, "dotresize"),
    "norm": Member(RegionKind.FFN, (("norm", solve_norm),)),
    "semi-relaxed": Member(RegionKind.FFN, (("semi-relaxed", solve_semi_relaxed),)),
    "recentred": Member(RegionKind.FFN, (("obs", solve_obs), *_RECENTRED), entered=True),
    "heads dropped": _core(RegionKind.HEADS, "kv-heads"),
    "heads transported": Member(RegionKind.HEADS, (("kv-heads", SOLVERS["kv-heads"]),), mix_values),
    "pairs dropped": _core(RegionKind.QUERY_KEY, "query-key-drop"),
    "pairs merged": _core(RegionKind.QUERY_KEY, "query-key"),
    "pairs transported": _pairs(),
    "pairs transported, chosen": _pairs(choose=True),
    "pairs merged with nearest": _pairs(transport=False),
    "stream pca": _core(RegionKind.RESIDUAL, "pca"),
    "stream transported": _core(RegionKind.RESIDUAL, "dotresize"),
}

FORMULATIONS: dict[str, Formulation] = {
    "merge": Formulation("merged", "obs", "removed neurons merged onto OBS's support, output-error cost"),
    "support": Formulation("semi-relaxed", "obs", "a semi-relaxed plan chooses the support, against OBS"),
    "support-norm": Formulation("semi-relaxed", "norm", "the same against the largest contributions"),
    "recentre": Formulation("recentred", "obs", "rows of the linear branch at the plan's barycentre"),
    "heads": Formulation("heads transported", "heads dropped", "values of removed KV heads moved onto kept ones"),
    "pairs": Formulation("pairs transported", "pairs dropped", "rotary pairs merged with pairs of near frequency"),
    "pairs-merged": Formulation("pairs transported", "pairs merged", "a plan or a hierarchy says which are merged"),
    "pairs-chosen": Formulation("pairs transported, chosen", "pairs dropped", "and a plan chooses which pairs stay"),
    "pairs-nearest": Formulation("pairs transported", "pairs merged with nearest", "merged by a plan or by least cost"),
    "stream": Formulation("stream transported", "stream pca", "the stream's basis from a plan, against PCA"),
}
