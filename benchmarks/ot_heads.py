"""Transport inside an attention: removed KV heads' values onto kept ones, removed rotary pairs onto near frequencies.

Values are moved in the writers at full width, so that dropping heads then costs less; weights have a bias, or zeros, as
last column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from ot_plans import chosen_mass

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region
from dotresize_fx.solvers.kv_heads import solve_kv_heads
from dotresize_fx.solvers.magnitude import top
from dotresize_fx.solvers.obs import damping
from dotresize_fx.solvers.query_key import drop_query_key
from dotresize_fx.solvers.rotary_pairs import merged_map, rotary_pairs
from dotresize_fx.transport.sinkhorn import sinkhorn

# In units of the cost, which is a share of what is removed.
EPSILON = 0.05
# How strongly kept pairs are held to equal shares of the removed ones.
CAPACITY = 0.05


def mix_values(
    region: Region,
    statistics: RegionStatistics,
    width: int,
    values: Sequence[str],
) -> Mapping[str, torch.Tensor]:
    """Value writers in which each kept KV head also carries what its query heads take over from removed ones, now zero.

    Query heads of removed KV heads are transported onto those of kept ones, the marginals being equal masses: the
    cost is the share of a head's output that least squares on the other's mixed values leaves, so heads that attend
    alike are near. Where P(t | h) of head h arrives at head t of KV head j, the new values V_j + S V_i are to be read
    through t's columns as h's own were, O_t S = P(t | h) (1 - cost) O_h, in the least-squares sense over j's heads.
    """
    weight, gram = statistics.reader_weight, statistics.gram
    assert weight is not None
    kept = solve_kv_heads(region, statistics, width).down.argmax(0).tolist()
    gone = [head for head in range(region.width) if head not in kept]
    name = values[0]
    written = statistics.writer_weights[name]
    if not gone or len(values) != 1 or len(written) % region.width:
        return {}
    size = len(written) // region.width
    shared = len(gram) // len(written)  # query heads a KV head
    heads = [slice(i * size, (i + 1) * size) for i in range(region.width * shared)]
    sources = [i * shared + g for i in gone for g in range(shared)]
    targets = [j * shared + g for j in kept for g in range(shared)]
    damped = gram + torch.diag(damping(gram))
    cost = gram.new_zeros(len(sources), len(targets))
    for b, t in enumerate(targets):
        for a, h in enumerate(sources):
            read, cross = weight[:, heads[h]], gram[heads[t], heads[h]]
            explained = cross.T @ torch.linalg.solve(damped[heads[t], heads[t]], cross)
            whole = ((read @ damped[heads[h], heads[h]]) * read).sum()
            cost[a, b] = (1 - ((read @ explained) * read).sum() / whole).clamp(0, 1)
    plan = sinkhorn(cost, epsilon=EPSILON, tolerance=1e-6, max_iterations=2000).plan * len(sources)
    passed = plan * (1 - cost)
    mixed = written.clone()
    for i in gone:
        mixed[heads[i]] = 0
    for j in kept:
        own = [(b, weight[:, heads[t]]) for b, t in enumerate(targets) if t // shared == j]
        moment = sum((read.T @ read for _, read in own), torch.zeros_like(gram[:size, :size]))
        moment = moment + torch.diag(damping(moment))
        for i in gone:
            theirs = [(a, weight[:, heads[h]]) for a, h in enumerate(sources) if h // shared == i]
            wanted = sum((passed[a, b] * read.T @ source for b, read in own for a, source in theirs), 0 * moment)
            mixed[heads[j]] += torch.linalg.solve(moment, wanted) @ written[heads[i]]
    return {name: mixed}


def solve_pairs(
    region: Region, statistics: RegionStatistics, width: int, *, choose: bool = False, transport: bool = True
) -> RegionMap:
    """Rotary pairs merged into those of most energy, as the core fits them; a plan says which goes where.

    The cost of a pair at a kept one is the share of its energy that merging the two loses. Removed pairs carry equal
    mass, kept ones are held to equal shares by CAPACITY; a pair goes where most of it arrives.

    ``choose``: the kept pairs are those that most energy arrives at when a plan between all pairs chooses its
    targets, not those of most energy. Without ``transport`` each removed pair goes where its own cost is least.
    """
    pairs = rotary_pairs(region, statistics)
    if pairs is None or width == region.width:
        return drop_query_key(region, statistics, width)
    energy = pairs.energies()
    cost = (pairs.costs() / energy.clamp_min(torch.finfo(energy.dtype).tiny)).fill_diagonal_(0).clamp(0, 1).T
    kept = top(chosen_mass(cost, energy / energy.sum()) if choose else energy, width // 2)
    leaving = torch.tensor([p for p in range(len(energy)) if p not in kept.tolist()])
    cost = cost[leaving][:, kept]
    places = cost.argmin(1)
    if transport:
        options = {"epsilon": EPSILON, "tolerance": 1e-6, "max_iterations": 2000}
        places = sinkhorn(cost, target_relaxation=CAPACITY, **options).plan.argmax(1)
    return merged_map(region, statistics, pairs.merge_into(kept, places))
