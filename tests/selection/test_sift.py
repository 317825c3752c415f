"""Properties of the choice for each query."""

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import DotProduct

from dsel_assets.selection.itl import select_informative
from dsel_assets.selection.kernels import Linear, Rbf
from dsel_assets.selection.nearest import nearest
from dsel_assets.selection.sift import select_for_each


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def draw(seed, count, d=24):
    return unit(np.random.default_rng(seed).standard_normal((count, d)) + 0.5)


X, Q = draw(0, 500), draw(1, 6)


@pytest.mark.parametrize("noise", [1e-4, 0.01, 1.0])
def test_with_all_as_neighbours_it_is_vtl_query_by_query(noise):
    found = select_for_each(X, Q, 20, neighbours=500, noise=noise)
    for query, chosen in zip(Q, found, strict=True):
        whole = select_informative(X, query[None], 20, rule="vtl", noise=noise)
        assert np.array_equal(chosen.indices, whole.indices)


def test_each_pick_leaves_the_smallest_variance_that_one_pick_can():
    [chosen] = select_for_each(X[:80], Q[:1], 8, neighbours=30, noise=0.05)
    near = np.argsort(-(X[:80] @ Q[0]))[:30]
    kernel = DotProduct(sigma_0=1e-10, sigma_0_bounds="fixed")
    for i in range(8):
        left = {}
        for p in set(near) - set(chosen.indices[:i]):
            rows = X[[*chosen.indices[:i], p]]
            gp = GaussianProcessRegressor(kernel, alpha=0.05, optimizer=None)
            sd = gp.fit(rows, np.zeros(len(rows))).predict(Q[:1], return_std=True)[1]
            left[p] = sd[0] ** 2
        assert chosen.indices[i] == min(left, key=left.get)
        assert chosen.target_variance[i, 0] == pytest.approx(min(left.values()), abs=1e-12)


def test_noise_trades_redundancy_for_nearness():
    copies = np.concatenate([X, np.repeat(X[np.argsort(-(X @ Q[0]))[:30]], 20, axis=0)])
    distinct = []
    for noise in (1e-4, 1.0, 100.0):
        # later on, what is left is noise, and another copy is worth as much as anything
        [chosen] = select_for_each(copies, Q[:1], 15, neighbours=800, noise=noise)
        distinct.append(len(np.unique(copies[chosen.indices].round(12), axis=0)))
    assert distinct[0] == 15 > distinct[1] > distinct[2]


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5])
def test_the_adaptive_stop(alpha):
    for free, stopped in zip(
        select_for_each(X, Q, 100, noise=0.01),
        select_for_each(X, Q, 100, noise=0.01, alpha=alpha),
        strict=True,
    ):
        count = len(stopped.indices)
        keeps = np.sqrt(free.target_variance[:, 0]) <= 1 / (alpha * np.arange(1, 101))
        assert keeps[:count].all() and (count == 100 or not keeps[count])
        assert np.array_equal(stopped.indices, free.indices[:count])


@pytest.mark.parametrize("kernel", [Linear(), Rbf(0.7)])
@pytest.mark.parametrize("k", [1, 7, 499, 500, 600])
def test_nearest_in_blocks_is_a_sort(kernel, k, monkeypatch):
    monkeypatch.setattr("dsel_assets.selection.arrays.CHUNK", 24 * 37)
    rows = X * np.random.default_rng(0).lognormal(0, 1, (500, 1))
    scale = np.sqrt(np.outer(kernel.diagonal(Q), kernel.diagonal(rows)))
    order = np.argsort(-kernel.matrix(rows, Q).T / scale, axis=1, kind="stable")
    assert np.array_equal(nearest(rows, Q, k, kernel), order[:, :k])


def test_nearest_of_equal_rows_are_the_first():
    same = np.ones((100, 3))
    assert nearest(same, same[:2], 5, Rbf()).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert nearest(np.zeros((9, 3)), same[:1], 2, Linear()).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"queries": Q[:, :3]}, "24 features but queries 3"),
        ({"neighbours": 0}, "0 nearest"),
        ({"n": 31}, "n = 31 picks from 30"),
        ({"queries": np.empty((0, 24))}, "queries"),
        ({"noise": -1.0}, "noise"),
    ],
)
def test_refusals(change, message):
    settings = {"candidates": X, "queries": Q, "n": 5, "neighbours": 30} | change
    with pytest.raises(ValueError, match=message):
        select_for_each(**settings)
