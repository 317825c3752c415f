"""From weights to a subset: who is drawn how often, and how alike two draws are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsel_assets.selection.rounding import ROUNDINGS, round_weights
from dsel_assets.selection.simplex import project_capped_simplex
from dsel_assets.selection.strata import Strata

WEIGHTS = np.array([0.25, 0.25, 0.2, 0.15, 0.1, 0.05, 0.0])
SIGMAS = 4.5  # of 7 counts under 3 rules, chance alone goes this far once in 10,000 runs


@settings(deadline=None, max_examples=60)
@given(
    N=st.integers(1, 50),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 10**6),
    rule=st.sampled_from(ROUNDINGS),
)
def test_distinct_and_repeatable(N, fraction, seed, rule):
    n = max(1, round(fraction * N))
    weights = project_capped_simplex(np.random.default_rng(seed).standard_normal(N) / n, 1 / n)
    indices = round_weights(weights, n, rule=rule, seed=seed)
    assert len(np.unique(indices)) == len(indices) == n
    assert indices.dtype == np.int64 and (weights[indices] > 0).all()
    assert np.array_equal(indices, round_weights(weights, n, rule=rule, seed=seed))
    assert np.array_equal(indices, round_weights(8 * weights, n, rule=rule, seed=seed))
    if rule == "sample" and n > 1:
        assert np.array_equal(round_weights(weights, n - 1, seed=seed), indices[:-1])


def frequencies(draws, n, **given):
    count = np.zeros(len(WEIGHTS))
    for seed in range(draws):
        count[round_weights(WEIGHTS, n, seed=seed, **given)] += 1
    return count


@pytest.mark.parametrize("rule", ["systematic", "pivotal"])
@pytest.mark.parametrize("order", [None, np.arange(7), np.arange(7)[::-1]])
def test_exact_rules_include_with_probability_n_s(rule, order):
    count = frequencies(4000, 4, rule=rule, order=order)
    sd = np.sqrt(4000 * 4 * WEIGHTS * (1 - 4 * WEIGHTS))
    assert (np.abs(count - 4000 * 4 * WEIGHTS) <= SIGMAS * sd).all(), "n s_i = 1 means always"


def test_sampling_draws_the_first_by_s_and_all_more_evenly():
    first, all_four = frequencies(4000, 1), frequencies(4000, 4)
    sd = np.sqrt(4000 * WEIGHTS * (1 - WEIGHTS))
    assert (np.abs(first - 4000 * WEIGHTS) <= SIGMAS * sd).all()
    assert (np.diff(all_four[1:]) < 0).all() and all_four[0] < 4000


def test_exact_rules_spread_over_the_clusters_of_their_order():
    """Neighbours compete, so a cluster's number of picks hardly varies."""
    cluster = np.repeat(np.arange(5), 40)
    weights = np.full(200, 1 / 200)

    def variance(**given):
        draws = [round_weights(weights, 20, seed=seed, **given) for seed in range(300)]
        return np.var([np.bincount(cluster[drawn], minlength=5) for drawn in draws], axis=0).mean()

    along = np.arange(200)
    assert variance(rule="systematic", order=along) < 1e-9
    assert variance(rule="pivotal", order=along) < 0.2 * variance(rule="sample")


@pytest.mark.parametrize("rule", ROUNDINGS)
def test_quotas_are_exact_and_proportional_within_a_part(rule):
    strata = Strata(np.array([0, 1, 0, 1, 0, 1, 1]), np.array([1, 1]))
    count, runs = np.zeros(7), 4000
    for seed in range(runs):
        drawn = round_weights(WEIGHTS, 2, rule=rule, strata=strata, seed=seed)
        assert np.bincount(strata.of[drawn]).tolist() == [1, 1]
        count[drawn] += 1
    shares = WEIGHTS[strata.of == 0] / WEIGHTS[strata.of == 0].sum()
    sd = np.sqrt(runs * shares * (1 - shares))
    assert (np.abs(count[strata.of == 0] - runs * shares) <= SIGMAS * sd).all()


def test_an_example_that_keeps_its_chance_is_drawn_again():
    rng = np.random.default_rng(0)
    uniforms, weights = rng.random(1100), np.full(1000, 1 / 1000)
    before = round_weights(weights, 100, uniforms=uniforms[:1000])
    after = round_weights(np.full(1100, 1 / 1100), 100, uniforms=uniforms)
    assert len(np.setdiff1d(after, before)) <= 25, "about a tenth of them are new rows"
    assert set(after) - set(before) <= set(range(1000, 1100)), "nothing old comes in"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: round_weights([0.5, 0.5, 0.0], 3), "n = 3 of 2"),
        (lambda: round_weights([0.5, -0.5], 1), "not negative"),
        (lambda: round_weights([0.5, np.nan], 1), "finite"),
        (lambda: round_weights([0.9, 0.1], 2, rule="systematic"), "no probability"),
        (lambda: round_weights([0.9, 0.1], 2, rule="pivotal"), "no probability"),
        (lambda: round_weights([0.9, 0.1], 2, rule="top"), "sample, systematic, pivotal"),
        (lambda: round_weights([0.9, 0.1], 1, order=[0, 1]), "no use for order"),
        (lambda: round_weights([0.9, 0.1], 1, rule="pivotal", uniforms=[0, 1]), "for uniforms"),
        (lambda: round_weights([0.9, 0.1], 1, uniforms=[0.5]), r"must be \[2\]"),
        (lambda: round_weights([0.9, 0.1], 1, strata=Strata.whole(2, 2)), "strata of 2 of 2"),
        (
            lambda: round_weights(
                [1.0, 0.0, 0.0], 1, strata=Strata(np.array([0, 1, 1]), np.array([0, 1]))
            ),
            "part 1: 1 of 0",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
