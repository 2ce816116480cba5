"""Transport inside an attention: removed KV heads' values onto kept ones, removed rotary pairs onto near frequencies.

Both change writers at full width, so that dropping what is then dropped costs less; weights have a bias, or zeros, as
last column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from ot_plans import chosen_mass

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.regions import Region
from dotresize_fx.solvers.kv_heads import solve_kv_heads
from dotresize_fx.solvers.magnitude import top
from dotresize_fx.solvers.obs import damping
from dotresize_fx.transport.sinkhorn import sinkhorn

# In units of the cost, which is a share of what is removed.
EPSILON = 0.05
# How strongly kept pairs are held to equal shares of the removed ones.
CAPACITY = 0.05
# Relative to the largest eigenvalue.
FLOOR = 1e-9


def mix_values(
    region: Region,
    statistics: RegionStatistics,
    width: int,
    values: Sequence[str],
    tables: Sequence[torch.Tensor],
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


def mix_pairs(
    region: Region,
    statistics: RegionStatistics,
    width: int,
    values: Sequence[str],
    tables: Sequence[torch.Tensor],
    *,
    choose: bool = False,
    transport: bool = True,
) -> Mapping[str, torch.Tensor]:
    """Queries and keys in which kept rotary pairs also carry removed ones; the removed ones become zero.

    Written as complex numbers, a pair's part of the score is conj(q) k turned by its angle times the distance. Pairs
    of equal angle may be mixed by any complex matrix; of near angles nearly so, by the coherence c = mean over
    distances of cos(difference of angles). Merging pair p into q keeps the leading singular value of
    Cq^(1/2) diag(1, c) Ck^(1/2), Cq and Ck being the pairs' second moments in one KV head, and loses the rest: that
    over the energy of p is the cost. Removed pairs carry equal mass, kept ones are held to equal shares by CAPACITY;
    a pair goes where most of it arrives, unless dropping it costs less.

    ``choose``: the kept pairs are those that most energy arrives at when a plan between all pairs chooses its
    targets, not those of most energy. Without ``transport`` each removed pair goes where its own cost is least.
    """
    n, half = region.width, region.width // 2
    if width == n or len(tables) != 2:
        return {}
    query, key = (side.cpu() for side in _complex_moments(region, statistics))  # a few small matrices
    energy = (query.diagonal(dim1=1, dim2=2).real * key.diagonal(dim1=1, dim2=2).real).sum(0)
    cost = _merging_cost(query, key, near := _coherence(tables, half).cpu(), energy)
    whole = float(energy.sum())
    kept = top(chosen_mass(cost.clamp(0, 1), energy / whole) if choose and whole > 0 else energy, width // 2)
    leaving = torch.tensor([p for p in range(half) if p not in kept.tolist()])
    cost = cost[leaving][:, kept]
    best = cost.argmin(1)
    if transport:
        options = {"epsilon": EPSILON, "tolerance": 1e-6, "max_iterations": 2000}
        best = sinkhorn(cost, target_relaxation=CAPACITY, **options).plan.argmax(1)
    mixed = {name: weight.clone() for name, weight in statistics.writer_weights.items() if name in region.writers}
    for b, place in enumerate(kept.tolist()):
        joined = [p for a, p in enumerate(leaving.tolist()) if int(best[a]) == b and float(cost[a, b]) < 1]
        if not joined:
            continue
        cluster = torch.tensor([place, *joined])
        left, right = (one.to(statistics.gram.device) for one in _leading(query, key, near[place, cluster], cluster))
        for name, weight in mixed.items():
            shaped = statistics.writer_weights[name].reshape(region.heads, -1, n, weight.shape[1])
            complex_rows = torch.complex(shaped[:, :, cluster], shaped[:, :, cluster + half])
            row = torch.einsum("hc,hgcd->hgd", right if name in region.key_writers else left, complex_rows)
            out = weight.view(region.heads, -1, n, weight.shape[1])
            out[:, :, place], out[:, :, place + half] = row.real, row.imag
    for weight in mixed.values():
        out = weight.view(region.heads, -1, n, weight.shape[1])
        out[:, :, leaving] = 0
        out[:, :, leaving + half] = 0
    return mixed


def _complex_moments(region: Region, statistics: RegionStatistics) -> tuple[torch.Tensor, torch.Tensor]:
    """E[z z*] of queries and of keys as complex numbers, (heads, n/2, n/2); queries summed over their KV head."""
    sides = []
    for keys in (False, True):
        names = [name for name in region.writers if (name in region.key_writers) is keys]
        gram = sum((statistics.written_gram(name) for name in names), statistics.gram.new_zeros(()))
        shape = (region.heads, len(gram) // (region.heads * region.width), 2, region.width // 2)
        blocks = torch.einsum("hgrahgsb->hrsab", gram.reshape(*shape, *shape))
        real, imaginary = blocks[:, 0, 0] + blocks[:, 1, 1], blocks[:, 1, 0] - blocks[:, 0, 1]
        sides.append(torch.complex(real, imaginary))
    return sides[0], sides[1]


def _coherence(tables: Sequence[torch.Tensor], half: int) -> torch.Tensor:
    """(n/2, n/2) from the cosines and sines, (length, n): the mean of cos(difference of angles) over distances.

    Distances count as often as they occur between two places of a sequence.
    """
    cosine, sine = (table[:, :half].double() for table in tables)
    often = torch.arange(len(cosine), 0, -1, dtype=torch.float64, device=cosine.device)
    often = often / often.sum()
    near: torch.Tensor = (cosine * often[:, None]).T @ cosine + (sine * often[:, None]).T @ sine
    return near.clamp(0, 1)


def _merging_cost(query: torch.Tensor, key: torch.Tensor, near: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """(p, q): the energy lost by merging pair p into pair q, as a share of p's; (n/2, n/2), 0 on the diagonal."""
    every = torch.arange(len(energy))
    pairs = torch.stack(torch.broadcast_tensors(every[None, :], every[:, None]), -1)
    values = torch.linalg.svdvals(_decomposed(query, key, near[pairs[..., :1], pairs], pairs)[0])
    lost = values[..., 1].square().sum(0) + (1 - near.square()) * energy[:, None]
    return (lost / energy[:, None].clamp_min(torch.finfo(lost.dtype).tiny)).fill_diagonal_(0)


def _decomposed(
    query: torch.Tensor, key: torch.Tensor, near: torch.Tensor, clusters: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cq^(1/2) diag(near) Ck^(1/2) of clusters (..., c), as (heads, ..., c, c), and the inverse roots."""
    roots, inverses = [], []
    for side in (query, key):
        values, vectors = torch.linalg.eigh(side[:, clusters[..., :, None], clusters[..., None, :]])
        floored = torch.maximum(values, (values[..., -1:] * FLOOR).clamp_min(torch.finfo(values.dtype).tiny)).sqrt()
        roots.append((vectors * floored[..., None, :]) @ vectors.mH)
        inverses.append((vectors / floored[..., None, :]) @ vectors.mH)
    return roots[0] @ (near[..., None] * roots[1]), inverses[0], inverses[1]


def _leading(
    query: torch.Tensor, key: torch.Tensor, near: torch.Tensor, cluster: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(heads, c) each: the weights of a cluster's queries and keys in the one pair that stands for it."""
    product, query_back, key_back = _decomposed(query, key, near, cluster)
    left, values, right = torch.linalg.svd(product)
    scale = values[:, :1].sqrt()
    # conj(q_new) k_new = q* b a.T k, so that the queries' weights are conj(b).
    for_queries = (query_back @ left[:, :, 0, None])[..., 0].conj() * scale
    for_keys = (right[:, 0, None] @ key_back)[:, 0] * scale
    return for_queries, for_keys
