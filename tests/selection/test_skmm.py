"""Properties of moment matching: the convex problem, its rounding, and the moments achieved."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize

from dsel_assets.selection import skmm
from dsel_assets.selection.moments import (
    energies,
    moment_diagnostics,
)
from dsel_assets.selection.rounding import ROUNDINGS, round_weights
from dsel_assets.selection.simplex import project_capped_simplex
from dsel_assets.selection.skmm import match_moments, select_matching


def pool(N, m, *, seed=0, decay=1.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((N, m)) * np.logspace(0, -decay, m)


def problem(sketches, c=0.999):
    """P, lambda and F from scratch, with singular vectors in place of eigenvectors."""
    _, sigma, Vt = np.linalg.svd(sketches, full_matrices=False)
    eigenvalues = sigma**2 / len(sketches)
    P = (sketches @ Vt.T) ** 2

    def objective(s):
        moment = P.T @ s
        gamma = np.maximum(1 / c, moment / eigenvalues)
        return float(((moment - gamma * eigenvalues) ** 2).sum())

    return P, eigenvalues, objective


def reference(eigenvalues, c=0.999):
    """The objective at s = 1/N, gamma = 1/c."""
    return float(((eigenvalues - eigenvalues / c) ** 2).sum())


def frank_wolfe_gap(sketches, s, n, c=0.999):
    P, eigenvalues, _ = problem(sketches, c)
    gradient = 2 * P @ np.minimum(0, P.T @ s - eigenvalues / c)
    return gradient @ s - np.sort(gradient)[:n].mean()


# The problem


@settings(deadline=None, max_examples=25)
@given(
    N=st.integers(2, 80),
    m=st.integers(1, 12),
    fraction=st.floats(0, 1),
    c=st.sampled_from([0.3, 0.9, 0.999]),
    seed=st.integers(0, 10**6),
)
def test_weights_are_feasible_and_optimal(N, m, fraction, c, seed):
    G, n = pool(N, m, seed=seed), max(1, round(fraction * N))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        match = match_moments(G, n, c=c, seed=seed)
    s = match.weights
    assert s.min() >= 0 and s.max() <= 1 / n * (1 + 1e-15)
    np.testing.assert_allclose(s.sum(), 1, atol=1e-12)
    _, eigenvalues, objective = problem(G, c)
    scale = reference(eigenvalues, c)
    np.testing.assert_allclose(match.objective, objective(s), rtol=1e-6, atol=1e-9 * scale)
    assert match.optimality <= 1e-6
    assert frank_wolfe_gap(G, s, n, c) <= 1e-4 * scale
    assert (match.gamma >= 1 / c).all() and match.support >= n * (1 - 1e-12)


def test_agrees_with_a_general_solver():
    G, n, c = pool(12, 5, seed=4), 4, 0.3
    P, eigenvalues, objective = problem(G, c)

    def gradient(s):
        return 2 * P @ np.minimum(0, P.T @ s - eigenvalues / c)

    at = np.random.default_rng(0).dirichlet(np.ones(12))
    numeric = [(objective(at + e) - objective(at - e)) / 2e-6 for e in 1e-6 * np.eye(12)]
    np.testing.assert_allclose(gradient(at), numeric, rtol=1e-5, atol=1e-7)

    other = minimize(
        objective,
        np.full(12, 1 / 12),
        jac=gradient,
        bounds=[(0, 1 / n)] * 12,
        constraints={"type": "eq", "fun": lambda s: s.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    with pytest.warns(UserWarning, match="out of reach"):
        match = match_moments(G, n, c=c)
    assert match.objective <= other.fun + 1e-6 * reference(eigenvalues, c)
    np.testing.assert_allclose(match.objective, other.fun, rtol=1e-4)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 20))
def test_the_dual_never_exceeds_the_objective(seed, n):
    rng = np.random.default_rng(seed)
    P, target = rng.random((20, 4)), rng.random(4)
    s = project_capped_simplex(rng.standard_normal(20) / n, 1 / n)
    u = rng.exponential(size=4)
    shortfall = np.maximum(target - s @ P, 0)
    assert skmm._dual(P, target, n, u) <= shortfall @ shortfall + 1e-12


def test_uniform_weights_reproduce_the_moment():
    P, eigenvalues = energies(pool(200, 10))
    np.testing.assert_allclose(np.full(200, 1 / 200) @ P, eigenvalues, rtol=1e-13)


def test_c_of_one_or_more_is_trivial_and_says_so():
    for c in (1.0, 1.5):
        with pytest.warns(UserWarning, match="uniform weights are already optimal"):
            match = match_moments(pool(300, 8), 30, c=c)
        assert match.objective <= 1e-12 and match.optimality <= 1e-6


def test_equal_norms_make_c_below_one_infeasible_and_say_so():
    G = pool(400, 12)
    G /= np.linalg.norm(G, axis=1, keepdims=True)
    with pytest.warns(UserWarning, match="no 50 examples have c_S below 1"):
        match = match_moments(G, 50)
    P, eigenvalues, objective = problem(G)
    assert match.objective > 0.01 * reference(eigenvalues)
    s = project_capped_simplex(np.random.default_rng(0).standard_normal(400), 1 / 50)
    np.testing.assert_allclose((P.T @ s).sum(), 1)
    assert match.objective <= objective(s)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        match_moments(pool(400, 12), 50)


@pytest.mark.parametrize("c", [0.9, 0.999])
def test_everything_chosen_leaves_no_choice(c):
    G = pool(60, 8)
    match = match_moments(G, 60, c=c)
    np.testing.assert_allclose(match.weights, 1 / 60)
    assert sorted(select_matching(G, 60)) == list(range(60))
    assert moment_diagnostics(G, np.arange(60))["c_s"] == pytest.approx(1)


def test_rotation_and_scale_do_not_matter():
    G, n = pool(300, 10), 40
    weights = match_moments(G, n).weights
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((10, 10)))[0]
    for other in (G @ rotation, 1e-5 * G, 3e4 * G):
        np.testing.assert_allclose(match_moments(other, n).weights, weights, atol=1e-6 / n)
    wide = np.concatenate([G, np.zeros((300, 3)), G @ rotation], axis=1)
    match = match_moments(wide, n)
    assert len(match.eigenvalues) == 10, "directions without any energy are left out"
    np.testing.assert_allclose(match.weights, weights, atol=1e-6 / n)


def test_order_and_duplicates_where_the_solution_is_unique():
    G, n, c = pool(24, 40, decay=0.2), 6, 0.2  # fewer rows than directions, all of them lacking
    with pytest.warns(UserWarning, match="out of reach"):
        weights = match_moments(G, n, c=c, tol=1e-10).weights
        other_start = match_moments(G, n, c=c, tol=1e-10, seed=9).weights
        order = np.random.default_rng(0).permutation(24)
        shuffled = match_moments(G[order], n, c=c, tol=1e-10).weights
        doubled = match_moments(np.repeat(G, 2, axis=0), 2 * n, c=c, tol=1e-10).weights
    np.testing.assert_allclose(other_start, weights, atol=1e-4)
    np.testing.assert_allclose(shuffled, weights[order], atol=1e-4)
    np.testing.assert_allclose(doubled.reshape(24, 2).sum(1), weights, atol=1e-4)


def test_more_iterations_never_make_it_worse():
    G = pool(500, 16)
    objectives = []
    for limit in (1, 5, 10, 20, 40):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            match = match_moments(G, 40, max_iterations=limit)
        assert bool(caught) == (match.optimality > 1e-6)
        objectives.append(match.objective)
    assert (np.diff(objectives) <= 0).all() and objectives[-1] < 1e-6 * objectives[0]


def test_seeds_draw_and_repeat():
    G = pool(300, 10)
    assert np.array_equal(match_moments(G, 30).weights, match_moments(G, 30).weights)
    assert not np.allclose(match_moments(G, 30).weights, match_moments(G, 30, seed=1).weights)


# The projection


finite = st.floats(-1e3, 1e3, allow_subnormal=False)


@settings(deadline=None, max_examples=200)
@given(v=arrays(float, st.integers(1, 40), elements=finite), share=st.floats(0, 1))
def test_projection_is_the_nearest_point(v, share):
    cap = 1 / len(v) + share * (1 - 1 / len(v))
    s = project_capped_simplex(v, cap)
    assert s.min() >= 0 and s.max() <= cap * (1 + 1e-15)
    np.testing.assert_allclose(s.sum(), 1, atol=1e-12)
    np.testing.assert_allclose(project_capped_simplex(s, cap), s, atol=1e-12)
    # The nearest point's residual supports the set: the best vertex is no better than s.
    residual = np.sort(v - s)[::-1]
    whole = int(1 / cap)
    best = cap * residual[:whole].sum() + (1 - whole * cap) * (
        residual[whole] if whole < len(v) else 0
    )
    assert (v - s) @ s >= best - 1e-9


def test_clamping_and_rescaling_is_not_the_projection():
    v, cap = np.array([0.9, 0.3, -0.2, 0.1]), 0.5
    rescaled = np.clip(v, 0, cap) / np.clip(v, 0, cap).sum()
    assert rescaled.max() > cap
    np.testing.assert_allclose(project_capped_simplex(v, cap), [0.5, 0.35, 0, 0.15])
    np.testing.assert_allclose(project_capped_simplex(v, 5.0), [0.8, 0.2, 0, 0], atol=1e-15)


def test_projection_of_a_long_vector_is_exact():
    v = np.random.default_rng(0).standard_normal(100_000) * 1e3
    s = project_capped_simplex(v, 1 / 5000)
    assert abs(s.sum() - 1) < 1e-13 and s.max() <= 1 / 5000
    with pytest.raises(ValueError, match="cannot add up to 1"):
        project_capped_simplex(v[:10], 0.05)
    with pytest.raises(ValueError, match="not finite"):
        project_capped_simplex([0.0, np.nan], 1.0)


# Rounding and selection


@settings(deadline=None, max_examples=50)
@given(
    N=st.integers(1, 50),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 10**6),
    rule=st.sampled_from(ROUNDINGS),
)
def test_rounding_is_distinct_and_repeatable(N, fraction, seed, rule):
    n = max(1, round(fraction * N))
    weights = project_capped_simplex(np.random.default_rng(seed).standard_normal(N) / n, 1 / n)
    indices = round_weights(weights, n, rule=rule, seed=seed)
    assert len(np.unique(indices)) == len(indices) == n
    assert indices.dtype == np.int64 and (weights[indices] > 0).all()
    assert np.array_equal(indices, round_weights(weights, n, rule=rule, seed=seed))
    if rule == "sample" and n > 1:
        assert np.array_equal(round_weights(weights, n - 1, seed=seed), indices[:-1])


def test_inclusion_probabilities():
    weights = np.array([0.25, 0.25, 0.2, 0.15, 0.1, 0.05, 0.0])
    draws = 4000
    counts = {rule: np.zeros(7) for rule in ROUNDINGS}
    first = np.zeros(7)
    for seed in range(draws):
        for rule, count in counts.items():
            count[round_weights(weights, 4, rule=rule, seed=seed)] += 1
        first[round_weights(weights, 1, seed=seed)] += 1
    sd = np.sqrt(draws * 0.25)
    np.testing.assert_allclose(counts["systematic"], draws * 4 * weights, atol=4 * sd)
    assert counts["systematic"][0] == draws, "n s_i = 1 means always"
    np.testing.assert_allclose(first, draws * weights, atol=4 * sd)
    assert (np.diff(counts["sample"][1:]) < 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_selection(dtype):
    G = torch.tensor(pool(200, 8)).to(dtype)
    indices = select_matching(G, 40, seed=3)
    assert len(np.unique(indices)) == 40 and indices.dtype == np.int64
    assert np.array_equal(indices, select_matching(G.double().numpy(), 40, seed=3))
    assert not np.array_equal(indices, select_matching(G, 40, seed=4))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda G: select_matching(G, 5, solver="greedy"), "unknown solver 'greedy'"),
        (lambda G: match_moments(G, 0), "n = 0"),
        (lambda G: match_moments(G, 31), "n = 31: a subset of 30"),
        (lambda G: match_moments(G, 5, c=0.0), "c = 0"),
        (lambda G: match_moments(np.zeros((4, 2)), 2), "all zero"),
        (lambda G: match_moments(np.empty((0, 2)), 1), "sketches"),
        (
            lambda G: match_moments(np.where(np.arange(30)[:, None] == 7, np.nan, G), 5),
            "not finite: 7",
        ),
        (lambda G: round_weights([0.5, 0.5, 0.0], 3), "n = 3 of 2"),
        (lambda G: round_weights([0.5, -0.5], 1), "not negative"),
        (lambda G: round_weights([0.9, 0.1], 2, rule="systematic"), "no probability"),
        (lambda G: round_weights([0.9, 0.1], 2, rule="top"), "sample, systematic"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(pool(30, 4))


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
