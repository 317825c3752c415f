"""Baselines that look at where an example lies: exact on small cases, whatever the rotation."""

import numpy as np
import pytest

from dsel_assets.selection.geometry import adaptive, herding, k_center, leverage
from dsel_assets.selection.moments import moment_diagnostics


def pool(N=60, m=6, seed=0):
    return np.random.default_rng(seed).standard_normal((N, m)) * np.logspace(0, -0.7, m)


def test_k_center_takes_the_farthest():
    G = pool()
    picks, radii = k_center(G, 12, seed=3)
    for i in range(1, 12):
        near = np.linalg.norm(G[:, None] - G[picks[:i]], axis=2).min(1)
        assert picks[i] == np.argmax(near)
        np.testing.assert_allclose(radii[i], near.max())
    assert radii[0] == radii[1] and (np.diff(radii) <= 1e-12).all()
    assert np.array_equal(k_center(G, 5, seed=3)[0], picks[:5])


@pytest.mark.parametrize("form", ["original", "published"])
def test_herding_is_its_definition(form):
    G = pool()
    picks = herding(G, 10, form=form)
    for i in range(10):
        lacking = (i + 1) * G.mean(0) - G[picks[:i]].sum(0)
        score = G @ lacking if form == "original" else np.linalg.norm(G - lacking, axis=1)
        score[picks[:i]] = -np.inf
        assert picks[i] == np.argmax(score)


def test_herding_follows_the_mean_and_the_published_form_does_not():
    G = pool(400) + 1
    off = {
        form: np.linalg.norm(G[herding(G, 40, form=form)].mean(0) - G.mean(0))
        for form in ("original", "published")
    }
    draws = [G[np.random.default_rng(s).choice(400, 40)].mean(0) - G.mean(0) for s in range(20)]
    uniform = np.linalg.norm(draws, axis=1).mean()
    assert 1.5 * off["original"] < uniform < off["published"]
    with pytest.raises(ValueError, match="original, published"):
        herding(G, 3, form="herded")


def test_adaptive_spans_the_pool_first_and_draws_by_squared_length():
    G = pool(80, 10)
    picks = adaptive(G, 30, seed=1)
    assert len(set(picks)) == 30
    assert moment_diagnostics(G, picks[:10])["rank"] == 10
    firsts = np.bincount([adaptive(G, 1, seed=s)[0] for s in range(3000)], minlength=80)
    shares = (G**2).sum(1) / (G**2).sum()
    sd = np.sqrt(3000 * shares * (1 - shares))
    assert (np.abs(firsts - 3000 * shares) < 4.5 * sd + 1).all()


def test_leverage_is_its_definition():
    G = pool()
    U = np.linalg.svd(G, full_matrices=False)[0]
    np.testing.assert_allclose(leverage(G, rank=3), (U[:, :3] ** 2).sum(1))
    np.testing.assert_allclose(leverage(G, rank=6).sum(), 6)
    ridged = np.diag(G @ np.linalg.solve(G.T @ G + 2.0 * np.eye(6), G.T))
    np.testing.assert_allclose(leverage(G, ridge=2.0), ridged)


@pytest.mark.parametrize(
    "call",
    [
        lambda G: k_center(G, 15)[0],
        lambda G: herding(G, 15),
        lambda G: herding(G, 15, form="published"),
        lambda G: adaptive(G, 15),
    ],
)
def test_rotation_and_precision_do_not_matter(call):
    G = pool()
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 6)))[0]
    assert np.array_equal(call(G), call(G @ turn))
    assert np.array_equal(call(G), call(G.astype(np.float32)))
    assert np.array_equal(call(G), call(3 * G))


def test_rows_of_one_example_count_together():
    blocks = pool(60).reshape(20, 3, 6)
    whole = blocks.reshape(60, 6)
    np.testing.assert_allclose(
        leverage(blocks, ridge=1.0), leverage(whole, ridge=1.0).reshape(20, 3).sum(1)
    )
    assert len(set(adaptive(blocks, 12, seed=2))) == 12


def test_equal_rows_are_chosen_once_each():
    G = np.repeat(pool(4), 5, axis=0)
    for picks in (k_center(G, 20)[0], herding(G, 20), adaptive(G, 20)):
        assert sorted(picks) == list(range(20))
