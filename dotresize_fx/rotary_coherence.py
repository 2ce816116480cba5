"""How alike the rotary pairs of a head turn over the distances that attention looks across."""

from __future__ import annotations

import torch

# A distance d counts as 1 / (d + OFFSET): attention mostly looks near, and errors count where it looks.
OFFSET = 1


def coherence(turns: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """(half, half) complex128: at (s, t) the mean of conj(D_s) D_t, D_p being what turns pair p of a score.

    A score of query position i and key position j has D_p = exp(1j angle_p (j - i)). Entries of two pairs that turn
    alike have absolute value 1; the matrix is Hermitian and positive semidefinite.

    turns: (length, half), exp(1j angle_p i) times a constant for each pair; positions are one apart. allowed:
    (length, length) bool, whether query i sees key j; at least one must.
    """
    turns = turns / turns.abs().clamp_min(torch.finfo(torch.float64).tiny)
    turns = turns * turns[:1].conj()
    places = torch.arange(len(turns), device=turns.device)
    away = places[None] - places[:, None]
    often = torch.bincount((away[allowed] + len(turns)).flatten(), minlength=2 * len(turns)).double()
    often = often / ((torch.arange(len(often), device=often.device) - len(turns)).abs() + OFFSET)
    backward, forward = often[1 : len(turns) + 1].flip(0), often[len(turns) :].clone()
    forward[0] = 0  # distance 0 is counted once
    summed = (turns * backward[:, None]).T @ turns.conj() + (turns.conj() * forward[:, None]).T @ turns
    found: torch.Tensor = summed / often.sum()
    return found


def turns_of(cosine: torch.Tensor, sine: torch.Tensor, pairs: int) -> torch.Tensor | None:
    """(length, pairs) complex128 from tables (..., length, pairs or twice as many): of their first sequence.

    None where they are no tables of so many pairs, each of one angle.
    """
    if cosine.ndim < 2 or cosine.shape[-2:] != sine.shape[-2:] or cosine.shape[-1] not in (pairs, 2 * pairs):
        return None
    length, times = cosine.shape[-2], cosine.shape[-1] // pairs
    cosine, sine = (table.reshape(-1, length, times, pairs)[0].double() for table in (cosine, sine))
    if not (torch.equal(cosine[:, 0], cosine[:, -1]) and torch.equal(sine[:, 0], sine[:, -1])):
        return None  # numbers that are not turned in pairs
    return torch.complex(cosine[:, 0], sine[:, 0])
