"""Running moments are those of the samples, and say how much the samples are worth."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from dsel_assets.selection import posterior
from dsel_assets.selection.posterior import Moments, merge, rank_correlation


def recorded(samples, per_batch=1, pieces=1):
    """Moments of samples [T, N], each given in so many pieces."""
    moments = Moments(lambda _: np.zeros(samples.shape[1], np.float32), per_batch)
    for sample in samples.astype(np.float32):
        moments.add(iter(np.array_split(sample, pieces)))
    return moments


def autoregressive(rng, steps, rows, rho):
    noise = rng.standard_normal((steps, rows)) * np.sqrt(1 - rho**2)
    series = np.empty((steps, rows))
    series[0] = rng.standard_normal(rows)
    for t in range(1, steps):
        series[t] = rho * series[t - 1] + noise[t]
    return series


@pytest.mark.parametrize("lengths", [(1,), (2,), (40,), (1, 1), (3, 50), (7, 20, 400)])
@pytest.mark.parametrize("pieces", [1, 3])
def test_chains_merge_to_the_moments_of_all_their_samples(lengths, pieces):
    rng = np.random.default_rng(0)
    chains = [rng.random((length, 30)) + 0.2 * i for i, length in enumerate(lengths)]
    found = merge([recorded(chain, pieces=pieces) for chain in chains])
    every = np.concatenate(chains)
    assert found.samples == len(every)
    np.testing.assert_allclose(found.mean, every.mean(0), rtol=1e-5)
    expected = every.std(0, ddof=1) if len(every) > 1 else np.zeros(30)
    np.testing.assert_allclose(found.sd, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "per_batch, batches, extra", [(5, 1, 0), (5, 8, 3), (1, 9, 0), (20, 30, 7)]
)
def test_batch_means_vary_as_they_do(per_batch, batches, extra):
    samples = np.random.default_rng(1).random((per_batch * batches + extra, 12))
    moments = recorded(samples, per_batch, pieces=2)
    means = samples[: per_batch * batches].reshape(batches, per_batch, -1).mean(1)
    expected = ((means - means.mean(0)) ** 2).sum(0)
    assert moments.batches == batches
    np.testing.assert_allclose(moments.between, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("chains", [1, 3])
def test_the_effective_sample_size_is_that_of_an_autoregression(rho, chains):
    """Exact for AR(1): T (1 - rho) / (1 + rho); samples 9,000, 300 rows to average over."""
    rng = np.random.default_rng(2)
    found = merge(
        [recorded(autoregressive(rng, 9_000 // chains, 300, rho), 100) for _ in range(chains)]
    )
    exact = 9_000 * (1 - rho) / (1 + rho)
    assert np.median(found.ess) == pytest.approx(exact, rel=0.15)
    assert (found.ess <= 9_000).all()


def test_too_few_batches_give_no_effective_sample_size():
    assert merge([recorded(np.random.default_rng(0).random((70, 3)), 10)]).ess is None
    assert merge([recorded(np.random.default_rng(0).random((80, 3)), 10)]).ess is not None


def test_agreement_is_one_where_chains_agree_and_more_where_they_do_not():
    rng = np.random.default_rng(3)
    chains = rng.standard_normal((4, 400, 50))
    chains[0, :, 25:] += 3
    found = merge([recorded(chain) for chain in chains]).agreement
    assert (found[:25] < 1.03).all() and (found[25:] > 1.5).all()
    assert merge([recorded(chains[0])]).agreement is None
    within, between = chains.var(1, ddof=1).mean(0), chains.mean(1).var(0, ddof=1)
    np.testing.assert_allclose(found, np.sqrt(399 / 400 + between / within), rtol=1e-3)


def test_weights_that_never_moved_agree_unless_they_differ():
    still, elsewhere = np.full((20, 1), 0.25), np.full((20, 1), 0.75)
    same, other = (merge([recorded(still), recorded(b)]) for b in (still, elsewhere))
    assert same.agreement == 1 and same.sd == 0 and same.ess == 40
    assert np.isinf(other.agreement)


def test_reset_forgets():
    samples = np.random.default_rng(4).random((60, 5))
    moments = recorded(samples[:20], 4)
    moments.reset(3)
    for sample in samples[20:].astype(np.float32):
        moments.add(iter([sample]))
    for name in Moments.ARRAYS:
        expected = getattr(recorded(samples[20:], 3), name)
        np.testing.assert_array_equal(getattr(moments, name), expected)


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(5)
    for a, b in (rng.random((2, 50)), rng.integers(0, 4, (2, 50))):
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert rank_correlation(np.ones(5), np.zeros(5)) == 1
    assert rank_correlation(np.ones(5), np.arange(5)) == 0


def test_of_many_entries_the_rank_correlation_is_nearly_spearmans(monkeypatch):
    rng = np.random.default_rng(6)
    a = rng.random(200_001).astype(np.float32)
    pairs = [(a, a**3 + 0.3 * rng.random(len(a))), (a, -a), (np.round(a, 1), rng.random(len(a)))]
    exact = [rank_correlation(*pair) for pair in pairs]
    monkeypatch.setattr(posterior, "EXACT", 1000)
    for pair, expected in zip(pairs, exact, strict=True):
        assert rank_correlation(*pair) == pytest.approx(expected, abs=2e-3)
    assert rank_correlation(a, np.ones(len(a))) == 0
    assert rank_correlation(np.ones(len(a)), np.ones(len(a))) == 1
