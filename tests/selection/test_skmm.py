"""Properties of moment matching: the convex problem, its rounding, and the moments achieved."""

import numpy as np
import pytest
import torch

from dsel_assets.selection.skmm import match_moments, select_matching


def pool(N, m, *, seed=0, decay=1.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((N, m)) * np.logspace(0, -decay, m)


# Selection


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_selection(dtype):
    G = torch.tensor(pool(200, 8)).to(dtype)
    indices = select_matching(G, 40, seed=3)
    assert len(np.unique(indices)) == 40 and indices.dtype == np.int64
    assert np.array_equal(indices, select_matching(G.double().numpy(), 40, seed=3))
    assert not np.array_equal(indices, select_matching(G, 40, seed=4))


def test_solvers_and_refusals():
    G = pool(30, 4)
    with pytest.raises(ValueError, match="unknown solver 'greedy'; the solvers are auto"):
        select_matching(G, 5, solver="greedy")
    assert np.array_equal(select_matching(G, 9), select_matching(G, 9, solver="sequential"))
    assert sorted(select_matching(G, 30)) == list(range(30))


# The clusters of section 4.1 of the paper


def clusters(N=2000, r=2400, K=8, spread=0.04, seed=0):
    """Axis-aligned clusters with centres of different norms; features and cluster of each row."""
    rng = np.random.default_rng(seed)
    sizes = np.diff([0, *np.sort(rng.integers(1, N - 1, K - 1)), N])
    norms = rng.integers(1, K + 1, K) * K
    stds = rng.random(K) * spread
    rng.standard_normal(K)  # the labels' ground truth
    cluster = np.repeat(np.arange(K), sizes)
    X = stds[cluster, None] * rng.standard_normal((N, r))
    X[np.arange(N), cluster] += norms[cluster]
    return X, cluster, sizes, norms, stds


@pytest.fixture(scope="module")
def clustered_sketches():
    X, cluster, sizes, norms, stds = clusters()
    assert sizes.tolist() == [82, 69, 389, 76, 406, 251, 427, 300]
    assert norms.tolist() == [8, 16, 56, 48, 64, 40, 40, 64]
    np.testing.assert_allclose(stds[[0, 3, 7]], [0.021745, 0.00010954, 0.00702622], rtol=1e-4)
    eigenvalues = np.linalg.eigvalsh(X @ X.T / len(X))[::-1]
    singular = [1289.545, 1108.524, 1104.541, 826.621, 633.722, 418.456, 132.929, 72.437, 2.797]
    np.testing.assert_allclose(np.sqrt(eigenvalues[:9] * len(X)), singular, atol=1e-3)
    gamma = np.random.default_rng(0).standard_normal((X.shape[1], 32)) / np.sqrt(32)
    return X @ gamma, cluster


def test_the_paper_instance_is_solved(clustered_sketches):
    G, _ = clustered_sketches
    for seed in range(3):
        match = match_moments(G, 48, seed=seed)
        assert match.objective <= 5e-2 and 48 <= match.support <= 150


def test_small_clusters_are_missed_less_often_than_by_uniform_draws(clustered_sketches):
    G, cluster = clustered_sketches
    seeds = range(50)
    missed = [len(np.unique(cluster[select_matching(G, 48, seed=seed)])) < 8 for seed in seeds]
    uniform = [
        len(np.unique(cluster[np.random.default_rng(seed).choice(2000, 48, replace=False)])) < 8
        for seed in seeds
    ]
    assert sum(missed) <= 15 and sum(missed) < sum(uniform)
