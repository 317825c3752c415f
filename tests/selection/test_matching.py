"""The convex problem of SkMM: optimal, certified, and blind to what must not matter."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from dsel_assets.selection import arrays
from dsel_assets.selection.matching import energies, match_moments
from dsel_assets.selection.moments import moment_diagnostics
from dsel_assets.selection.simplex import project_capped_simplex
from dsel_assets.selection.strata import Strata


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


def certified(sketches, match, n, c=0.999):
    """How far the objective may lie above its minimum, by the prices and from scratch."""
    P, eigenvalues, objective = problem(sketches.astype(np.float64), c)
    u = match.prices[::-1]
    assert u.min() >= 0
    values = np.sort(P @ u)
    bound = u @ eigenvalues / c - u @ u / 4 - values[len(values) - n :].mean()
    return objective(match.weights) - max(bound, 0.0)


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
    assert certified(G, match, n, c) <= 2e-6 * scale
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


def test_projected_gradients_descend_and_never_pass_the_certificate():
    G, n, c = pool(60, 6), 12, 0.3
    P, eigenvalues, objective = problem(G, c)
    with pytest.warns(UserWarning, match="out of reach"):
        match = match_moments(G, n, c=c)
    steepness = 2 * np.linalg.norm(np.vstack([P, np.diag(eigenvalues)]), 2) ** 2
    s, seen = np.full(60, 1 / 60), []
    for _ in range(300):
        seen.append(objective(s))
        gradient = 2 * P @ np.minimum(0, P.T @ s - eigenvalues / c)
        s = project_capped_simplex(s - gradient / steepness, 1 / n)
    assert (np.diff(seen) <= 1e-12 * seen[0]).all() and seen[-1] < 0.9 * seen[0]
    assert seen[-1] >= match.objective - match.optimality * reference(eigenvalues, c)


def test_uniform_weights_reproduce_the_moment():
    P, eigenvalues, unit = energies(pool(200, 10)[:, None])
    np.testing.assert_allclose(np.full(200, 1 / 200) @ P, eigenvalues, rtol=1e-13)
    np.testing.assert_allclose(eigenvalues * unit, np.sort(problem(pool(200, 10))[1]), rtol=1e-12)


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


# Quotas, warm starts, rows that come together, and pools on disk


def test_quotas_are_constraints():
    G, n = pool(200, 8), 40
    strata = Strata(np.repeat([0, 1, 2], [100, 60, 40]), np.array([10, 25, 5]))
    match = match_moments(G, n, strata=strata)
    np.testing.assert_allclose(np.bincount(strata.of, match.weights), strata.counts / n)
    assert match.optimality <= 1e-6
    assert match.weights.min() >= 0 and match.weights.max() <= 1 / n * (1 + 1e-15)
    free = match_moments(G, n)
    assert np.array_equal(match_moments(G, n, strata=Strata.whole(200, n)).weights, free.weights)


def test_quotas_agree_with_a_general_solver():
    G, n, c = pool(12, 5, seed=4), 4, 0.3
    of, counts = np.repeat([0, 1], 6), np.array([3, 1])
    P, eigenvalues, objective = problem(G, c)
    other = minimize(
        objective,
        np.r_[np.full(6, 3 / 24), np.full(6, 1 / 24)],
        jac=lambda s: 2 * P @ np.minimum(0, P.T @ s - eigenvalues / c),
        bounds=[(0, 1 / n)] * 12,
        constraints=[
            {"type": "eq", "fun": lambda s, k=k: s[of == k].sum() - counts[k] / n} for k in range(2)
        ],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    with pytest.warns(UserWarning):
        match = match_moments(G, n, c=c, strata=Strata(of, counts))
    np.testing.assert_allclose(match.objective, other.fun, rtol=1e-4)


def test_a_warm_start_stays_near_and_costs_no_more_than_the_certificate():
    old, new, n = pool(1000, 12), pool(50, 12, seed=1), 100
    before = match_moments(old, n).weights
    G, start = np.vstack([old, new]), np.r_[before, np.zeros(50)]
    warm, cold = match_moments(G, n, start=start), match_moments(G, n, seed=1)
    scale = reference(problem(G)[1])
    assert warm.objective - cold.objective <= (warm.optimality + 1e-12) * scale
    away = [np.abs(match.weights - start).sum() / 2 for match in (warm, cold)]
    assert away[0] < 0.2 * away[1]
    again = match_moments(G, n, start=warm.weights)
    np.testing.assert_allclose(again.weights, warm.weights, atol=1e-12), "nothing left to do"


def test_many_small_quotas():
    rng = np.random.default_rng(0)
    of = np.concatenate([np.arange(300), rng.integers(0, 300, 2700)])
    strata = Strata(of, np.bincount(of) // 5)
    assert (strata.counts == 0).any() and (strata.counts > 1).any()
    match = match_moments(pool(3000, 12), strata.n, strata=strata)
    np.testing.assert_allclose(np.bincount(of, match.weights) * strata.n, strata.counts, atol=1e-9)
    assert match.optimality <= 1e-6 and 0.99 * strata.n <= match.support


def test_rows_of_one_example_share_its_weight():
    blocks, n = pool(180, 6).reshape(60, 3, 6), 15
    P, eigenvalues, unit = energies(blocks)
    apart, alike, own_unit = energies(blocks.reshape(180, 1, 6))
    np.testing.assert_allclose(P, apart.reshape(60, 3, 6).mean(1))
    np.testing.assert_allclose([*eigenvalues, unit], [*alike, 3 * own_unit])
    s = match_moments(blocks, n).weights
    shortfall = np.maximum(alike / 0.999 - np.repeat(s / 3, 3) @ apart, 0)
    assert (shortfall**2).sum() <= 2e-6 * reference(alike)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_chunks_and_files_do_not_matter(monkeypatch, tmp_path, dtype):
    G, n = pool(400, 10).astype(dtype), 50
    whole = match_moments(G, n)
    assert certified(G, whole, n) <= 2e-6 * reference(problem(G.astype(np.float64))[1])
    np.save(tmp_path / "G.npy", G)
    mapped = match_moments(np.load(tmp_path / "G.npy", mmap_mode="r"), n)
    assert np.array_equal(mapped.weights, whole.weights)
    monkeypatch.setattr(arrays, "CHUNK", 70)
    np.testing.assert_allclose(match_moments(G, n).weights, whole.weights, atol=1e-4 / n)


def test_equal_norms_in_single_precision_do_not_stop_it():
    """Then the norms differ by rounding alone, and so do the prices of the rows."""
    G = pool(2000, 32).astype(np.float32)
    G /= np.linalg.norm(G, axis=1, keepdims=True)
    for seed in range(3):
        with pytest.warns(UserWarning, match="out of reach") as caught:
            match = match_moments(G, 200, seed=seed)
        assert match.optimality <= 1e-6 and len(caught) == 1


def test_what_it_tells_while_it_works(caplog, capsys):
    with caplog.at_level("INFO", logger="dsel_assets.selection.matching"):
        match = match_moments(pool(200, 6), 40)
    assert f"{match.iterations} iterations, optimality {match.optimality:.2g}" in caplog.text
    assert not capsys.readouterr().err
    match_moments(pool(200, 6), 40, progress=True)
    assert "moments" in capsys.readouterr().err


@pytest.mark.slow
def test_a_million_examples_on_disk(tmp_path):
    N, m, limit = 1_000_000, 256, 300
    G = np.lib.format.open_memmap(tmp_path / "G.npy", "w+", np.float32, (N, m))
    for start in range(0, N, 100_000):
        G[start : start + 100_000] = pool(100_000, m, seed=start)
    G.flush()
    code = (
        "import resource, sys, numpy as np;"
        "from dsel_assets.selection.matching import match_moments;"
        "match = match_moments(np.load(sys.argv[1], mmap_mode='r'), 1000);"
        "used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20;"
        "assert match.optimality <= 1e-6, match.optimality;"
        "assert used <= 6, f'{used:.1f} GiB'"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "G.npy"], check=True, timeout=limit)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda G: match_moments(G, 0), "n = 0"),
        (lambda G: match_moments(G, 31), "n = 31: a subset of 30"),
        (lambda G: match_moments(G, 5, c=0.0), "c = 0"),
        (lambda G: match_moments(np.zeros((4, 2)), 2), "all zero"),
        (lambda G: match_moments(np.empty((0, 2)), 1), "sketches"),
        (
            lambda G: match_moments(np.where(np.arange(30)[:, None] == 7, np.nan, G), 5),
            "not finite: 7",
        ),
        (lambda G: match_moments(G, 5, start=np.ones(3)), "start has shape"),
        (lambda G: match_moments(G, 5, strata=Strata.whole(30, 4)), "strata of 30 examples, 4"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(pool(30, 4))


@pytest.mark.parametrize(
    "sketches, message",
    [
        (np.ones((20, 3)), "all examples have the same moment"),
        (np.hstack([pool(20, 2), np.zeros((20, 2))]), "2 of 4 directions are left out"),
        (pool(40, 12), "4 examples span at most 4 of 12 directions"),
    ],
)
def test_what_no_weights_can_mend_is_told(sketches, message):
    with pytest.warns(UserWarning, match=message):
        match_moments(sketches, 4)
