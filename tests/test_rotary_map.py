"""Rotary pairs as complex numbers."""

from __future__ import annotations

import torch

from dotresize_fx.rotary_map import mixes_pairs, real_matrix

GENERATOR = torch.Generator().manual_seed(0)


def complex_numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.complex128)


def as_numbers(pairs: torch.Tensor) -> torch.Tensor:
    return torch.cat([pairs.real, pairs.imag], -1)


def test_real_numbers_are_mixed_as_complex_ones_are() -> None:
    pairs, mixing = complex_numbers(7, 4), complex_numbers(4, 3)
    torch.testing.assert_close(as_numbers(pairs) @ real_matrix(mixing), as_numbers(pairs @ mixing))
    assert real_matrix(complex_numbers(2, 4, 3)).shape == (2, 8, 6)


def test_mixing_commutes_with_turning_all_by_one_angle() -> None:
    pairs, mixing = complex_numbers(7, 4), real_matrix(complex_numbers(4, 3))
    turn = torch.polar(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    mixed = as_numbers(pairs) @ mixing
    turned = as_numbers(torch.complex(mixed[:, :3], mixed[:, 3:]) * turn)
    torch.testing.assert_close(as_numbers(pairs * turn) @ mixing, turned)


def test_what_mixes_whole_pairs() -> None:
    mixing = real_matrix(complex_numbers(2, 4, 3))
    assert mixes_pairs(mixing)
    assert mixes_pairs(mixing * (1 + 1e-15))
    assert mixes_pairs(torch.zeros(4, 2, dtype=torch.float64))
    torn = mixing.clone()
    torn[1, 0, 5] += 1e-3
    assert not mixes_pairs(torn)
    assert not mixes_pairs(mixing[..., :5])
    assert not mixes_pairs(mixing[..., :7, :])
