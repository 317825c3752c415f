"""Draws by scores and by what is left of rows, over more rows than one sum of scores holds."""

import numpy as np
import pytest

from dsel_assets.selection.moments import second_moment
from dsel_assets.selection.passes import CHUNK
from dsel_assets.selection.pivoting import Span, Urn
from dsel_assets.selection.strata import Strata

N = 3 * CHUNK + 100
SIGMAS = 4.5  # of fifty counts, chance alone goes this far once in three thousand runs


def urn(sampler="linear", temperature=1e-3, strata=None, seed=0):
    strata = Strata.whole(N, N) if strata is None else strata
    return Urn(strata, np.random.default_rng(seed), sampler, temperature)


@pytest.mark.parametrize("sampler", ["linear", "softmax"])
def test_draws_without_replacement_by_the_scores(sampler):
    few = np.random.default_rng(1).choice(N, 20, replace=False)
    scores = np.zeros(N)
    scores[few] = np.linspace(0.5, 1.5, 20)
    shares = scores / scores.sum()
    if sampler == "softmax":
        shares = np.exp(shares / 0.01) / np.exp(shares / 0.01).sum()
    draws = 1000
    first = []
    for seed in range(draws):
        own = urn(sampler, 0.01, seed=seed)
        own.score(scores)
        first.append(own.draw())
        if seed < 5 and sampler == "linear":
            assert sorted([first[-1], *(own.draw() for _ in range(19))]) == sorted(few)
            assert own.total == 0 and own.draw() not in few
    counts = np.bincount(first, minlength=N)
    sd = np.sqrt(draws * shares * (1 - shares))
    assert (np.abs(counts - draws * shares)[few] <= SIGMAS * sd[few]).all()
    assert sampler == "softmax" or counts[few].sum() == draws


def test_a_full_part_is_closed():
    of = np.arange(N) % 3
    own = urn(strata=Strata(of, np.array([2, 0, 5])))
    own.score(np.ones(N))
    rows = [own.draw() for _ in range(7)]
    assert np.bincount(of[rows], minlength=3).tolist() == [2, 0, 5]
    assert not own.open.any() and own.total == 0


def test_what_is_left_is_exact_down_to_the_faintest_direction():
    """Energies from 1 to 1e-11 of the largest: every direction is covered by rows that have it."""
    G = np.random.default_rng(0).standard_normal((500, 1, 24)) * np.logspace(0, -5.5, 24)
    own = Urn(Strata.whole(500, 500), np.random.default_rng(0))
    span = Span(G, second_moment(G), own)
    rows, energy = [], (G**2).sum()
    while span.open:
        rows.append(own.draw(pivot=True))
        share = span.cover(np.array(rows[-1:]))
        Q, left = np.linalg.qr(G[rows, 0].T)[0], G[:, 0].copy()
        for _ in range(2):
            left -= (left @ Q) @ Q.T
        exact = (left**2).sum(1)
        exact[rows] = 0
        np.testing.assert_allclose(
            own.scores, exact, rtol=1e-6, atol=1e-9 * exact.max() + 1e-22 * energy
        )
        assert share > 0
        np.testing.assert_allclose(span.missed, exact.sum() / energy, atol=1e-15)
    assert len(rows) == 24 and span.missing == 0
