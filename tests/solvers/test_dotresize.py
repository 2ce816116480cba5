"""dotresize: a basis of the transported span on a stream, anchored merging in an FFN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.solvers.dotresize import MERGE, output_error, solve_dotresize
from dotresize_fx.solvers.obs import solve_obs


def stream(width: int) -> Region:
    return Region("stream", RegionKind.RESIDUAL, Symmetry.ORTHOGONAL, width, ("w",), ("r",))


def ffn(width: int) -> Region:
    return Region("ffn", RegionKind.FFN, Symmetry.PERMUTATION, width, ("w",), ("r",))


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(x: torch.Tensor, *, samples: bool = False) -> RegionStatistics:
    """A reader that puts every neuron out by itself."""
    reader = torch.eye(x.shape[1], dtype=torch.float64)
    return RegionStatistics(len(x), x.T @ x / len(x), reader, samples=x if samples else None)


# -- on a stream -----------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@given(n=st.integers(2, 10), data=st.data(), samples=st.booleans(), seed=st.integers(0, 99))
def test_a_basis_is_orthonormal(n: int, data: st.DataObject, samples: bool, seed: int) -> None:
    k = data.draw(st.integers(1, n))
    found = solve_dotresize(stream(n), statistics(rows(30, n, seed), samples=samples), k)
    # QR in float64.
    torch.testing.assert_close(found.down.T @ found.down, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-10)
    assert found.up is not None
    assert torch.equal(found.up, found.down.T)


def test_a_stream_of_full_width_is_left_as_it_is() -> None:
    found = solve_dotresize(stream(5), statistics(rows(30, 5)), 5)
    assert torch.equal(found.down, torch.eye(5, dtype=torch.float64))


def test_a_removed_twin_is_carried_by_the_channel_it_copies() -> None:
    x = rows(60, 5)
    x = torch.cat([x * 3, x[:, 2:3] * 2.9], 1)
    found = solve_dotresize(stream(6), statistics(x, samples=True), 5)
    # Row 5 of the basis: the removed channel; it must lean on channel 2's direction more than on any other.
    similarity = (found.down[:5] @ found.down[5]).abs()
    assert int(similarity.argmax()) == 2


def test_equal_channels_still_give_a_basis() -> None:
    x = rows(30, 1).expand(30, 6)
    for samples in (False, True):
        found = solve_dotresize(stream(6), statistics(x, samples=samples), 3)
        torch.testing.assert_close(found.down.T @ found.down, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-10)


# -- in an FFN -------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@given(n=st.integers(2, 12), data=st.data(), seed=st.integers(0, 99))
def test_merged_neurons_are_weighted_means_around_their_anchor(n: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, n))
    found = solve_dotresize(ffn(n), statistics(rows(40, n, seed)), k)
    down = found.down
    assert down.shape == (n, k)
    assert bool((down >= 0).all())
    torch.testing.assert_close(down.sum(0), torch.ones(k, dtype=torch.float64), rtol=0, atol=1e-9)
    anchors = down.argmax(0)
    assert len(set(anchors.tolist())) == k
    # An anchor goes into its own column only.
    assert torch.equal((down[anchors] > 0).sum(1), torch.ones(k, dtype=torch.int64))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(n=st.integers(3, 12), data=st.data(), seed=st.integers(0, 99))
def test_the_support_is_what_elimination_keeps(n: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, n - 1))
    seen = statistics(rows(40, n, seed) @ rows(n, n, seed + 1))
    found, kept = solve_dotresize(ffn(n), seen, k), solve_obs(ffn(n), seen, k)
    assert torch.equal(found.down.argmax(0), kept.down.argmax(0))


def test_a_removed_neuron_goes_where_it_is_near() -> None:
    x = rows(200, 5)
    x[:, 4] = 0.5 * x[:, 1] + 0.1 * x[:, 4]  # the least to lose, and nearly a multiple of neuron 1
    found = solve_dotresize(ffn(5), statistics(x), 4)
    assert found.up is None  # merged neurons need their reader refitted
    arriving = found.down[4]
    assert int(arriving.argmax()) == 1
    assert float(arriving[1] / arriving.sum()) > 0.99
    norms = x.square().mean(0).sqrt()
    share = MERGE * norms[4] / (norms[1] + MERGE * norms[4])
    assert float(arriving[1]) == pytest.approx(float(share), rel=1e-2)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(n=st.integers(2, 8), seed=st.integers(0, 99))
def test_output_error_is_what_the_best_multiple_leaves(n: int, seed: int) -> None:
    x = rows(30, n, seed)
    found = output_error(x.T @ x / len(x))
    for i in range(n):
        for j in range(n):
            multiple = (x[:, i] @ x[:, j]) / (x[:, j] @ x[:, j])
            left = (x[:, i] - multiple * x[:, j]).square().sum() / x[:, i].square().sum()
            assert float(found[i, j]) == pytest.approx(float(left), abs=1e-10)  # float64
    some, others = torch.arange(0, n, 2), torch.arange(1, n)
    assert torch.equal(output_error(x.T @ x / len(x), some, others), found[some][:, others])


def test_an_ffn_of_full_width_is_a_selection() -> None:
    full = solve_dotresize(ffn(6), statistics(rows(40, 6)), 6)
    assert torch.equal(full.down, torch.eye(6, dtype=torch.float64))


def test_dead_and_constant_neurons_give_finite_maps() -> None:
    live = rows(40, 6)
    dead = live.clone()
    dead[:, 3:] = 0
    for x in (dead, torch.zeros(40, 6, dtype=torch.float64), torch.ones(40, 6, dtype=torch.float64)):
        found = solve_dotresize(ffn(6), statistics(x), 4)
        assert torch.isfinite(found.down).all()
        assert bool((found.down.sum(0) > 0).all())


def test_says_how_the_transport_went() -> None:
    found = solve_dotresize(ffn(6), statistics(rows(40, 6)), 4)
    assert int(found.notes["sinkhorn iterations"]) >= 1
    assert float(found.notes["marginal error"]) <= 1e-6


def test_what_keeps_neurons_apart_is_selected_and_not_merged() -> None:
    """A depthwise convolution has a kernel a channel: no mean of two neurons has one."""
    x = rows(40, 8)
    apart = replace(ffn(8), tables=("kernel",))
    found = solve_dotresize(apart, statistics(x), 5)
    assert torch.equal(found.down, solve_obs(apart, statistics(x), 5).down)
    assert not torch.equal(found.down, solve_dotresize(ffn(8), statistics(x), 5).down)
