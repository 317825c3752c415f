"""Properties of the greedy transductive choice, against brute force and against scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import DotProduct

from dsel_assets.selection import itl
from dsel_assets.selection.itl import select_informative


def clustered(candidates, targets, d, *, seed=0, norm_spread=0.0):
    """Rows around 20 random directions; the targets come from the first two."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((20, d)) / np.sqrt(d)

    def draw(labels):
        rows = centres[labels] + 0.9 * rng.standard_normal((len(labels), d)) / np.sqrt(d)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows * rng.lognormal(0, norm_spread, (len(rows), 1))

    return draw(rng.integers(0, 20, candidates)), draw(rng.integers(0, 2, targets))


def posterior(X, given_rows, noise):
    """Posterior covariance of f at the rows of X, from scratch in float64."""
    X, R = np.asarray(X, float), np.asarray(given_rows, float)
    cross = X @ R.T
    return X @ X.T - cross @ np.linalg.solve(R @ R.T + noise * np.eye(len(R)), cross.T)


def brute_force(X, T, n, noise, rule, form):
    picks = []
    for _ in range(n):
        K = posterior(np.concatenate([X, T]), X[picks], noise)
        v, cross, targets = np.diag(K)[: len(X)], K[: len(X), len(X) :], K[len(X) :, len(X) :]
        if rule == "vtl":
            score = (cross**2).sum(1) / (v + noise)
        else:
            seen = np.linalg.solve(targets + noise * np.eye(len(T)), cross.T)
            added = noise if form == "paper" else 0.0
            score = (v + added) / (np.maximum(v - (cross * seen.T).sum(1), 1e-12) + added)
        score[picks] = -np.inf
        picks.append(int(np.argmax(score)))
    return picks


@pytest.mark.parametrize("rule, form", [("itl", "paper"), ("itl", "library"), ("vtl", "paper")])
@pytest.mark.parametrize("noise", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("d", [64, 192])
def test_picks_are_those_of_brute_force(rule, form, noise, dtype, d):
    X, T = (rows.astype(dtype) for rows in clustered(300, 20, d))
    chosen = select_informative(X, T, 40, rule=rule, form=form, noise=noise)
    assert chosen.indices.tolist() == brute_force(X, T, 40, noise, rule, form)


@pytest.mark.parametrize("form", ["paper", "library"])
@pytest.mark.parametrize("noise", [1e-4, 1.0])
def test_feature_form_equals_factor_form(monkeypatch, form, noise):
    X, T = clustered(400, 10, 150, norm_spread=0.5)
    factored = select_informative(X, T, 60, form=form, noise=noise)
    monkeypatch.setattr(itl, "FACTOR_BYTES", 0)
    featured = select_informative(X, T, 60, form=form, noise=noise)
    assert np.array_equal(factored.indices, featured.indices)
    np.testing.assert_allclose(factored.gains, featured.gains, rtol=1e-9)
    np.testing.assert_allclose(factored.target_variance, featured.target_variance, atol=1e-12)


def test_target_variance_is_that_of_a_gaussian_process():
    X, T = clustered(200, 15, 30)
    chosen = select_informative(X, T, 25, noise=0.05)
    for count in (1, 10, 25):
        picked = X[chosen.indices[:count]]
        kernel = DotProduct(sigma_0=1e-10, sigma_0_bounds="fixed")
        gp = GaussianProcessRegressor(kernel, alpha=0.05, optimizer=None)
        sd = gp.fit(picked, np.zeros(count)).predict(T, return_std=True)[1]
        np.testing.assert_allclose(chosen.target_variance[count - 1], sd**2, atol=1e-12)


@pytest.mark.parametrize("rule", ["itl", "vtl"])
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    targets=st.integers(1, 30),
    d=st.integers(2, 60),
    n=st.integers(0, 20),
    noise=st.sampled_from([1e-4, 0.01, 1.0, 100.0]),
)
def test_gains_add_up_to_the_information_about_the_targets(rule, seed, targets, d, n, noise):
    X, T = clustered(25, targets, d, seed=seed, norm_spread=0.3)
    chosen = select_informative(X, T, n, rule=rule, noise=noise)

    def entropy(given_rows):
        return np.linalg.slogdet(posterior(T, given_rows, noise) + noise * np.eye(targets))[1] / 2

    lost = entropy(X[:0]) - entropy(X[chosen.indices])
    np.testing.assert_allclose(chosen.gains.sum(), lost, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", ["itl", "vtl"])
def test_target_variance_never_increases(rule):
    X, T = clustered(500, 30, 20)
    chosen = select_informative(X, T, 60, rule=rule, noise=0.01)
    variance = np.vstack([(T**2).sum(1), chosen.target_variance])
    assert np.diff(variance, axis=0).max() < 1e-12
    assert variance[-1].max() < 0.1
    assert (chosen.gains >= 0).all()


def test_one_target_makes_the_rules_agree():
    X, T = clustered(200, 1, 30, seed=3, norm_spread=0.5)
    chosen = select_informative(X, T, 40, noise=0.1)
    by_variance = select_informative(X, T, 40, rule="vtl", noise=0.1)
    assert np.array_equal(chosen.indices, by_variance.indices)
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    first = select_informative(unit, T, 1, noise=0.1).indices[0]
    assert first == np.argmax(np.abs(unit @ T[0]))


def test_uncertainty_falls_to_what_the_candidates_cannot_tell():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((30, 12)))[0].T
    X = rng.standard_normal((300, 12)) @ basis
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    T = rng.standard_normal((10, 30)) / np.sqrt(30)
    irreducible = (T**2).sum(1) - ((T @ basis.T) ** 2).sum(1)
    excess = select_informative(X, T, 200, noise=1e-3).target_variance - irreducible
    assert excess.min() > -1e-12
    assert excess[11].max() > excess[49].max() > excess[199].max()
    assert excess[199].max() < 1e-3


@pytest.mark.parametrize("rule, form", [("itl", "paper"), ("itl", "library"), ("vtl", "paper")])
def test_invariances(rule, form):
    X, T = clustered(150, 12, 16, norm_spread=0.4)
    rng = np.random.default_rng(1)

    def picks(X, T, noise):
        return select_informative(X, T, 30, rule=rule, form=form, noise=noise).indices

    reference = picks(X, T, 0.1)
    order = rng.permutation(len(X))
    assert np.array_equal(order[picks(X[order], T, 0.1)], reference)
    assert np.array_equal(picks(X, T[::-1], 0.1), reference)
    rotation = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    assert np.array_equal(picks(X @ rotation, T @ rotation, 0.1), reference)
    assert np.array_equal(picks(3e-6 * X, 3e-6 * T, 0.1 * 9e-12), reference)


def test_default_noise_is_the_mean_squared_norm():
    X, T = clustered(100, 5, 16, norm_spread=0.4)
    default = select_informative(X, T, 10)
    explicit = select_informative(X, T, 10, noise=float((X**2).sum(1).mean()))
    assert np.array_equal(default.indices, explicit.indices)
    np.testing.assert_allclose(default.gains, explicit.gains)


def test_duplicates_and_equal_rows():
    X, T = clustered(200, 10, 40)
    doubled = np.concatenate([X, X])
    picks = select_informative(doubled, T, 60, noise=1e-3).indices
    assert picks.max() < 200, "of two equal rows the first is taken, and its copy adds little"
    assert len(np.unique(picks)) == 60
    same = select_informative(np.ones((7, 3), np.float32), np.ones((2, 3)), 7)
    assert same.indices.tolist() == list(range(7))
    zeros = select_informative(np.zeros((4, 3)), np.ones((2, 3)), 4, form="library", noise=1.0)
    assert sorted(zeros.indices) == [0, 1, 2, 3] and (zeros.gains == 0).all()


@pytest.mark.parametrize("rule", ["itl", "vtl"])
@pytest.mark.parametrize("d", [40, 400])
@settings(deadline=None, max_examples=8)
@given(split=st.integers(0, 60))
def test_resumed_choice_is_the_uninterrupted_one(rule, d, split):
    X, T = clustered(300, 10, d)
    whole = select_informative(X, T, 60, rule=rule, noise=0.02)
    first = select_informative(X, T, split, rule=rule, noise=0.02)
    rest = select_informative(X, T, 60 - split, rule=rule, noise=0.02, state=first.state)
    assert np.array_equal(np.concatenate([first.indices, rest.indices]), whole.indices)
    np.testing.assert_allclose(np.concatenate([first.gains, rest.gains]), whole.gains, rtol=1e-8)
    np.testing.assert_allclose(
        np.concatenate([first.target_variance, rest.target_variance]),
        whole.target_variance,
        atol=1e-12,
    )
    assert np.array_equal(rest.state["picks"], whole.indices)


def test_state_survives_a_file_and_refuses_other_data(tmp_path):
    X, T = clustered(60, 5, 8)
    state = select_informative(X, T, 5, noise=0.1).state
    np.savez(tmp_path / "state.npz", **state)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as stored:
        loaded = dict(stored)
    again = select_informative(X, T, 5, noise=0.1, state=loaded)
    assert not set(again.indices) & set(state["picks"])
    with pytest.raises(ValueError, match="candidates"):
        select_informative(X * 2, T, 5, noise=0.1, state=state)
    with pytest.raises(ValueError, match="targets"):
        select_informative(X, T[1:], 5, noise=0.1, state=state)
    with pytest.raises(ValueError, match="noise"):
        select_informative(X, T, 5, noise=0.2, state=state)


def test_taken_candidates_are_skipped_and_not_observed():
    X, T = clustered(80, 5, 16)
    free = select_informative(X, T, 10, noise=0.1)
    allowed = np.setdiff1d(np.arange(80), free.indices[:4])
    within = select_informative(X, T, 10, noise=0.1, taken=free.indices[:4])
    alone = select_informative(X[allowed], T, 10, noise=0.1)
    assert np.array_equal(within.indices, allowed[alone.indices])
    everything = select_informative(X, T, 76, noise=0.1, taken=free.indices[:4])
    assert set(everything.indices) == set(allowed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_torch_equals_numpy(dtype):
    X, T = (torch.tensor(rows).to(dtype).requires_grad_() for rows in clustered(100, 5, 16))
    as_numpy = [rows.detach().double().numpy() for rows in (X, T)]
    ours = select_informative(X, T, 20, noise=0.1)
    assert np.array_equal(ours.indices, select_informative(*as_numpy, 20, noise=0.1).indices)
    assert ours.indices.dtype == np.int64 and ours.gains.dtype == np.float64
    assert ours.target_variance.shape == (20, 5)


def test_a_large_batch_has_no_repeats_and_begins_with_the_small_one():
    X, T = (rows.astype(np.float32) for rows in clustered(5000, 40, 32))
    picks = select_informative(X, T, 1000).indices
    assert len(np.unique(picks)) == 1000
    assert np.array_equal(select_informative(X, T, 100).indices, picks[:100])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n": 21}, "n = 21 picks from 20"),
        ({"n": 20, "taken": [3, 4]}, "n = 20 picks from 18"),
        ({"n": -1}, "n = -1"),
        ({"rule": "best"}, "itl, vtl"),
        ({"form": "other"}, "paper, library"),
        ({"noise": 0.0}, "positive"),
        ({"taken": [20]}, "taken"),
        ({"taken": [True] * 20}, "taken"),
        ({"targets": np.empty((0, 4))}, "targets"),
        ({"targets": np.ones((2, 3))}, "4 features but targets 3"),
        ({"candidates": np.empty((0, 4))}, "candidates"),
        ({"candidates": np.ones(4)}, "candidates"),
        ({"candidates": np.zeros((20, 4))}, "noise"),
    ],
)
def test_refusals(change, message):
    arguments = {"candidates": np.eye(20, 4) + 1, "targets": np.eye(4)[:2], "n": 3} | change
    with pytest.raises(ValueError, match=message):
        select_informative(**arguments)


def test_rows_that_are_not_finite_are_named():
    X, T = clustered(20, 3, 4)
    X[[2, 7], 1] = np.nan, np.inf
    with pytest.raises(ValueError, match="candidates has 2 rows that are not finite: 2, 7"):
        select_informative(X, T, 3)
