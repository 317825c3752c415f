"""The interval and the verdict keep what they promise, also with a handful of seeds."""

import numpy as np
import pytest

from dsel_assets.evaluation import holm, paired_difference, verdict

SEEDS, EXAMPLES, RUNS = 5, 80, 300


def normal(rng, true, by_seed, by_example, noise=0.3):
    return (
        true
        + by_seed * rng.standard_normal((SEEDS, 1))
        + by_example * rng.standard_normal((1, EXAMPLES))
        + noise * rng.standard_normal((SEEDS, EXAMPLES))
    )


def right_or_wrong(rng, _, by_seed, by_example):
    """Differences in {-1, 0, 1} of two classifiers that are equally good on hard and easy rows."""
    ease = 1 + by_example * rng.standard_normal((1, EXAMPLES))
    scores = ease + by_seed * rng.standard_normal((2, SEEDS, 1))
    first, second = scores + rng.standard_normal((2, SEEDS, EXAMPLES)) > 0
    return first.astype(float) - second


def runs(draw, true, by_seed, by_example):
    rng = np.random.default_rng(0)
    for seed in range(RUNS):
        difference = draw(rng, true, by_seed, by_example)
        yield paired_difference(difference, resamples=600, seed=seed)


# Simulations


@pytest.mark.parametrize("draw", [normal, right_or_wrong])
@pytest.mark.parametrize("by_seed", [0.0, 0.05, 0.5])
def test_where_there_is_no_difference_one_is_rarely_shown(draw, by_seed):
    shown = [
        verdict(found, found.p, 0.95) != "no difference shown"
        for found in runs(draw, 0.0, by_seed, 0.3)
    ]
    assert np.mean(shown) <= 0.08


@pytest.mark.parametrize("by_seed, by_example", [(0.0, 0.5), (0.1, 0.3), (0.5, 0.0)])
def test_a_true_difference_lies_in_the_interval(by_seed, by_example):
    inside = [found.low <= 0.2 <= found.high for found in runs(normal, 0.2, by_seed, by_example)]
    assert np.mean(inside) >= 0.92


def test_a_clear_difference_is_shown():
    shown = [verdict(found, found.p, 0.95) for found in runs(normal, 0.3, 0.05, 0.3)]
    assert np.mean(np.array(shown) == "better") > 0.95


# paired_difference


@pytest.fixture
def difference():
    return normal(np.random.default_rng(3), 0.05, 0.1, 0.3)


def test_swapping_the_two_turns_the_answer_round(difference):
    one, other = paired_difference(difference), paired_difference(-difference)
    assert one.mean == -other.mean and one.p == other.p
    assert one.low == pytest.approx(-other.high) and one.high == pytest.approx(-other.low)


def test_shift_and_scale_go_through(difference):
    one, moved = paired_difference(difference), paired_difference(3 * difference + 2)
    for part in ("mean", "low", "high"):
        assert getattr(moved, part) == pytest.approx(3 * getattr(one, part) + 2)


def test_the_mean_lies_inside_and_more_confidence_is_wider(difference):
    found = [paired_difference(difference, confidence=c) for c in (0.8, 0.95, 0.99)]
    assert all(each.low < each.mean < each.high for each in found)
    assert found[0].mean == difference.mean()
    widths = [each.high - each.low for each in found]
    assert widths == sorted(widths)


def test_fewer_seeds_are_wider():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((20, 1)) + 0.1 * rng.standard_normal((20, EXAMPLES))
    values -= values.mean()
    widths = []
    for seeds in (2, 4, 10, 20):
        group = values[:seeds] - values[:seeds].mean()
        group *= values.mean(1).std() / group.mean(1).std()
        found = paired_difference(group)
        widths.append(found.high - found.low)
    assert widths == sorted(widths, reverse=True)


def test_the_same_call_gives_the_same_answer(difference):
    assert paired_difference(difference) == paired_difference(difference.copy())
    assert paired_difference(difference, seed=1) != paired_difference(difference)


@pytest.mark.parametrize("value", [0.0, 0.25, -0.25, 1.0])
@pytest.mark.parametrize("shape", [(2, 2), (5, 80)])
def test_differences_without_variance(value, shape):
    found = paired_difference(np.full(shape, value))
    assert [found.mean, found.low, found.high] == pytest.approx([value] * 3)
    if value == 0:
        assert found.p == 1 and verdict(found, found.p, 0.95) == "no difference shown"
    else:
        assert found.p < 0.01
        assert verdict(found, found.p, 0.95) == ("better" if value > 0 else "worse")


@pytest.mark.parametrize("seed", range(20))
def test_p_is_a_probability_and_agrees_with_the_interval(seed):
    rng = np.random.default_rng(seed)
    found = paired_difference(normal(rng, rng.normal(0, 0.1), 0.05, 0.2), resamples=500)
    assert 0 < found.p <= 1
    if found.p < 0.045:
        assert found.low > 0 or found.high < 0
    if found.p > 0.06:
        assert found.low <= 0 <= found.high


def test_types_that_count_right_and_wrong_are_welcome():
    values = np.random.default_rng(0).integers(-1, 2, (5, 80))
    assert paired_difference(values.astype(np.float32)) == paired_difference(values * 1.0)
    assert paired_difference(values) == paired_difference(values * 1.0)


@pytest.mark.parametrize("shape", [(1, 80), (5, 1), (0, 80), (5, 0)])
def test_too_little_is_refused(shape):
    with pytest.raises(ValueError, match="at least 2 seeds and 2 examples"):
        paired_difference(np.zeros(shape))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_differences_that_are_not_finite_are_refused(difference, value):
    difference[1, 4] = value
    with pytest.raises(ValueError, match="not finite"):
        paired_difference(difference)


# holm and verdict


def test_holm_by_hand():
    p = {"skmm": 0.01, "bads": 0.04, "itl": 0.03, "full": 0.005}
    expected = {"skmm": 0.03, "bads": 0.06, "itl": 0.06, "full": 0.02}
    assert holm(p) == pytest.approx(expected)
    assert list(holm(p)) == list(p)


@pytest.mark.parametrize(
    "p, expected",
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
        ([0.01, 1.0], [0.02, 1.0]),
    ],
)
def test_holm_at_the_edges(p, expected):
    named = {str(i): value for i, value in enumerate(p)}
    assert list(holm(named).values()) == pytest.approx(expected)


def test_holm_never_lowers_and_keeps_the_order():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = dict(enumerate(rng.random(6)))
        found = holm(p)
        assert all(p[name] <= found[name] <= 1 for name in p)
        assert sorted(p, key=p.get) == sorted(p, key=lambda name: (found[name], p[name]))


@pytest.mark.parametrize(
    "mean, p, expected",
    [
        (0.1, 0.05, "better"),
        (0.1, 0.0501, "no difference shown"),
        (-0.1, 0.01, "worse"),
        (-0.1, 0.9, "no difference shown"),
    ],
)
def test_the_verdict_follows_the_adjusted_p(mean, p, expected):
    found = paired_difference(np.full((2, 2), mean))
    assert verdict(found, p, 0.95) == expected
