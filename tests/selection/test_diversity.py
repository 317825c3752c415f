"""Diversity: against brute force, and whatever the order of rows, the blocks and the precision."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.cluster import kmeans_plusplus as scikit_learns
from torch import nn
from torch.nn import functional as F

from dsel_assets.data.examples import Examples
from dsel_assets.models import add_lora
from dsel_assets.selection import Budget, diversity
from dsel_assets.selection.diversity import (
    Badge,
    Facility,
    FacilityTarget,
    KMeansPlusPlus,
    ProbCover,
    TypiClust,
    facility_location,
    kmeans_plusplus,
    loss_gradients,
    probcover,
    pure_radius,
    typiclust,
)

FEATURES, CLASSES, D, ROWS = 6, 3, 8, 48
SELECTORS = {
    "kmeanspp": KMeansPlusPlus,
    "badge": lambda: Badge(model=build),
    "typiclust": TypiClust,
    "probcover": ProbCover,
    "facility": Facility,
    "facility_target": FacilityTarget,
}
every = pytest.mark.parametrize("name", SELECTORS)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.ReLU(), nn.Linear(5, CLASSES))


def rows_of(N=ROWS, d=D, seed=0, unit=True):
    """Rows around six centres."""
    rng = np.random.default_rng(seed)
    rows = 2 * rng.standard_normal((6, d))[rng.integers(0, 6, N)] + rng.standard_normal((N, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) if unit else rows


def examples(rows, seed, prefix):
    rng = np.random.default_rng(seed)
    return Examples(
        ids=np.array([f"{prefix}{i:03d}" for i in range(rows)]),
        labels=rng.integers(0, CLASSES, rows),
        groups=np.full(rows, ""),
        inputs=rng.standard_normal((rows, FEATURES)).astype(np.float32),
        sketches=rows_of(rows, seed=seed, unit=False).astype(np.float32),
    )


POOL, TARGET = examples(ROWS, 0, "p"), examples(7, 1, "t")


def ids(name, n, pool=POOL, seed=0):
    return SELECTORS[name]().select(pool, TARGET, Budget(n), seed=seed).ids.tolist()


@pytest.fixture(params=[None, 1, 100])
def blocks(request, monkeypatch):
    """As large as they come, of one row, of a few; gains are looked at two at a time."""
    if request.param is not None:
        monkeypatch.setattr(diversity, "BLOCK", request.param)
        monkeypatch.setattr(diversity, "LAZY", 2)


# All of them


@every
def test_the_order_of_the_pool_does_not_matter(name):
    for seed in range(2):
        shuffled = POOL.take(np.random.default_rng(seed).permutation(ROWS))
        assert ids(name, 9, shuffled, seed) == ids(name, 9, seed=seed)


@every
def test_nested_ones_are_prefixes(name):
    whole = ids(name, ROWS)
    assert sorted(whole) == POOL.ids.tolist()
    if SELECTORS[name]().traits.nested:
        for n in (1, 2, 11, ROWS - 1):
            assert ids(name, n) == whole[:n]


@every
def test_the_seed_matters_where_it_is_said_to(name):
    draws = {tuple(ids(name, 9, seed=seed)) for seed in range(4)}
    assert len(draws) == 1 if SELECTORS[name]().traits.deterministic else len(draws) > 1


@every
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_equal_rows_are_chosen_once_each(name):
    three = np.arange(ROWS) % 3
    few = replace(POOL, inputs=POOL.inputs[three], sketches=POOL.sketches[three])
    for n in (1, 3, 20, ROWS - 1):
        assert len(set(ids(name, n, few))) == n


@every
def test_the_smallest_pools_and_one_class(name):
    single = replace(POOL, labels=np.zeros(ROWS, np.int64))
    assert len(set(ids(name, 5, single))) == 5
    assert ids(name, 1, POOL.take([3])) == [POOL.ids[3]]
    assert len(ids(name, 1, POOL.take([3, 4]))) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda X, n: kmeans_plusplus(X, n),
        lambda X, n: typiclust(X, n),
        lambda X, n: probcover(X, n, delta=1.0),
        lambda X, n: facility_location(X, n),
    ],
)
def test_what_cannot_be_chosen_is_refused(call):
    for n in (0, -1, ROWS + 1):
        with pytest.raises(ValueError, match=f"{n} of {ROWS} rows can't be chosen"):
            call(rows_of(), n)
    rows = rows_of()
    rows[4, 1] = np.inf
    with pytest.raises(ValueError, match="not finite: 4"):
        call(rows, 3)


# k-means++


def test_the_second_is_drawn_by_squared_distance_to_the_first():
    X = rows_of(12, unit=False)
    draws = np.array([kmeans_plusplus(X, 2, seed=s)[0] for s in range(4000)])
    squares = ((X[:, None] - X) ** 2).sum(2)
    shares = (squares / squares.sum(1, keepdims=True)).mean(0)
    for place, expected in ((0, np.full(12, 1 / 12)), (1, shares)):
        found = np.bincount(draws[:, place], minlength=12)
        sd = np.sqrt(4000 * expected * (1 - expected))
        assert (np.abs(found - 4000 * expected) < 4.5 * sd).all()


def test_seeds_are_as_good_as_scikit_learns():
    X = rows_of(200, unit=False)
    ours, theirs = [], []
    for seed in range(150):
        picks, potential = kmeans_plusplus(X, 8, seed=seed)
        nearest = ((X[:, None] - X[picks]) ** 2).sum(2).min(1)
        assert potential == pytest.approx(nearest.mean())
        ours.append(potential)
        centres = scikit_learns(X, 8, random_state=seed, n_local_trials=1)[0]
        theirs.append(((X[:, None] - centres) ** 2).sum(2).min(1).mean())
    error = np.sqrt((np.var(ours) + np.var(theirs)) / 150)
    assert abs(np.mean(ours) - np.mean(theirs)) < 4 * error


def test_every_place_is_taken_before_any_twice():
    X = np.repeat(1e3 + rows_of(10, unit=False), 4, axis=0)
    for seed in range(10):
        for dtype in (np.float32, np.float64):
            picks, _ = kmeans_plusplus(X.astype(dtype), 40, seed=seed)
            assert len(set(picks[:10] // 4)) == 10 and len(set(picks)) == 40
    assert kmeans_plusplus(X, 10, seed=3)[1] == 0


# BADGE


def explicit(model, inputs):
    """The gradients of the loss by the last layer, example by example, by autograd."""
    found = []
    for x in inputs:
        logits = model(x[None])
        loss = F.cross_entropy(logits, logits.argmax(1))
        parts = torch.autograd.grad(loss, list(model[-1].parameters()))
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found).double().numpy()


@pytest.mark.parametrize("bias", [True, False])
def test_badges_distances_are_those_of_the_gradients_themselves(bias):
    model = build()
    model[-1] = nn.Linear(5, CLASSES, bias=bias)
    inputs = torch.from_numpy(POOL.inputs)
    factors, kernel = loss_gradients(model, inputs)
    assert factors.shape == (ROWS, CLASSES + 5) and factors.dtype == np.float32
    formed = explicit(model, inputs)
    norms, inner = kernel.diagonal(factors), kernel.matrix(factors, factors)
    squares = ((formed[:, None] - formed) ** 2).sum(2)
    np.testing.assert_allclose(norms[:, None] + norms - 2 * inner, squares, atol=1e-6)
    for seed in range(5):
        picks = kmeans_plusplus(factors, 20, kernel=kernel, seed=seed)[0]
        assert np.array_equal(picks, kmeans_plusplus(formed, 20, seed=seed)[0])


def test_badge_reads_below_the_adapters_and_leaves_no_hook():
    plain, adapted = build(), build()
    add_lora(adapted, rank=2)
    inputs = torch.from_numpy(POOL.inputs)
    one, other = loss_gradients(plain, inputs), loss_gradients(adapted, inputs)
    np.testing.assert_allclose(one[0], other[0], atol=1e-6)
    assert one[1] == other[1]
    assert not any(part._forward_pre_hooks for part in adapted.modules())


def test_badge_reads_no_label_and_reports_the_gradients_lengths():
    found = Badge(model=build).select(POOL, None, Budget(9), seed=0)
    assert found.ids.tolist() == ids("badge", 9, replace(POOL, labels=POOL.labels[::-1].copy()))
    formed = explicit(build(), torch.from_numpy(POOL.inputs))
    norms = np.linalg.norm(formed[np.searchsorted(POOL.ids, found.ids)], axis=1)
    np.testing.assert_allclose(found.scores["gradient_norm"], norms, rtol=1e-5)


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Flatten(), "no parameters"),
        (nn.Sequential(nn.Linear(FEATURES, 4), nn.LayerNorm(4)), "end in a linear layer"),
        (nn.Sequential(nn.Linear(FEATURES, 4), nn.AvgPool1d(2)), "does not give"),
    ],
)
def test_a_model_that_does_not_end_in_a_linear_layer_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        loss_gradients(model, torch.from_numpy(POOL.inputs))


# TypiClust


def apart(sizes, seed=0):
    """Clusters of these sizes that are far from each other, and whose each row is."""
    rng = np.random.default_rng(seed)
    of = np.repeat(np.arange(len(sizes)), sizes)
    return 50 * np.eye(len(sizes))[of] + rng.standard_normal((len(of), len(sizes))), of


def test_each_cluster_gives_its_most_typical_largest_first():
    X, of = apart([9, 30, 12, 21, 15])
    picks = typiclust(X, 10, most_clusters=5)
    assert of[picks].tolist() == 2 * [1, 3, 4, 2, 0]
    left = np.ones(len(X), bool)
    for pick in picks:
        members = np.flatnonzero((of == of[pick]) & left)
        distances = np.linalg.norm(X[members, None] - X[members], axis=2)
        near = np.sort(distances, 1)[:, 1 : 1 + min(20, len(members) // 2)]
        assert pick == members[near.mean(1).argmin()]
        left[pick] = False


def test_small_clusters_come_last_and_everything_once():
    X, of = apart([3, 12, 5, 6])
    picks = typiclust(X, 26, most_clusters=4)
    assert set(of[picks[:18]]) == {1, 3} and len(set(picks)) == 26
    assert of[picks[18:21]].tolist() == [2, 0, 2]
    assert of[typiclust(X, 4, small=0)].tolist() == [1, 3, 2, 0]


def test_many_clusters_go_by_batches():
    X = rows_of(300)
    picks = typiclust(X, 80)
    assert len(set(picks)) == 80 and np.array_equal(picks, typiclust(X, 80))


# ProbCover


def brute_cover(X, n, delta):
    near = np.linalg.norm(X[:, None] - X, axis=2) < delta
    np.fill_diagonal(near, True)
    bare, free, picks = np.ones(len(X), bool), np.ones(len(X), bool), []
    for _ in range(n):
        gains = (near & bare).sum(1) if bare.any() else near.sum(1)
        picks.append(int(np.argmax(np.where(free, gains, -1))))
        free[picks[-1]] = False
        bare &= ~near[picks[-1]]
    return picks


@pytest.mark.parametrize("delta", [1e-3, 0.3, 0.7, 1.1, 2.5])
def test_balls_cover_as_by_brute_force(delta, blocks):
    X = rows_of(90)
    picks, shares = probcover(X, 90, delta=delta)
    assert picks.tolist() == brute_cover(X, 90, delta)
    for i in (0, 4, 30):
        near = (np.linalg.norm(X[:, None] - X[picks[: i + 1]], axis=2) < delta).any(1)
        assert shares[i] == pytest.approx(near.mean())
    assert (np.diff(shares) >= 0).all() and shares[-1] == 1


@pytest.mark.parametrize("delta", [0.0, 1.0, 1.5, 2.0])
def test_on_a_grid_ties_go_to_the_first_and_the_border_is_outside(delta, blocks):
    X = np.stack(np.meshgrid(np.arange(6.0), np.arange(5.0)), -1).reshape(-1, 2)
    picks, _ = probcover(X, 30, delta=delta)
    assert picks.tolist() == brute_cover(X, 30, delta)


def test_a_radius_that_is_none_is_refused():
    for delta in (-1.0, np.nan):
        with pytest.raises(ValueError, match="must not be negative"):
            probcover(rows_of(), 3, delta=delta)


@pytest.mark.parametrize("purity", [0.5, 0.9, 0.95, 1.0])
def test_the_radius_is_the_largest_at_which_enough_balls_are_pure(purity, blocks):
    X, parts = rows_of(60), np.arange(60) % 4
    distances = np.linalg.norm(X[:, None] - X, axis=2)
    alien = parts[:, None] != parts

    def pure(delta):
        return 1 - ((distances < delta) & alien).any(1).mean()

    delta = pure_radius(X, parts, purity=purity)
    assert pure(delta * (1 - 1e-6)) >= purity > pure(delta * (1 + 1e-6))


def test_where_all_is_one_part_the_radius_reaches_everything():
    X = rows_of()
    assert pure_radius(X, np.zeros(len(X))) == pytest.approx(2)
    with pytest.raises(ValueError, match="purity = 0"):
        pure_radius(X, np.zeros(len(X)), purity=0)


def test_the_rule_covers_and_a_given_radius_is_kept():
    found = ProbCover().select(POOL, None, Budget(10), seed=0)
    assert 0 < found.diagnostics["delta"] < 2 and 0 < found.diagnostics["covered"] <= 1
    given = ProbCover(delta=0.5).select(POOL, None, Budget(10), seed=0)
    assert given.diagnostics["delta"] == 0.5


# Facility location


def brute_facility(X, n, clients):
    picks, since = [], []
    while len(picks) < n:
        free = ~np.isin(np.arange(len(X)), picks)
        now = (clients @ X[since].T).max(1).sum() if since else -np.inf
        sums = np.array([(clients @ X[[*since, j]].T).max(1).sum() for j in range(len(X))])
        if sums[free].max() < now + 1e-9:
            since = []
            continue
        picks.append(int(np.argmax(free & (sums >= sums[free].max() - 1e-9))))
        since.append(picks[-1])
    return picks


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_facilities_are_those_of_brute_force(unit, dtype, blocks):
    X = rows_of(70, unit=unit).astype(dtype)
    T = rows_of(25, seed=1, unit=unit).astype(dtype)
    for clients in (None, T):
        picks, gains = facility_location(X, 40, clients=clients)
        served = np.asarray(X if clients is None else clients, float)
        assert picks.tolist() == brute_facility(X.astype(float), 40, served)
        best = np.maximum.accumulate(served @ X[picks].astype(float).T, axis=1).sum(0)
        np.testing.assert_allclose(np.diff(best)[:5], gains[1:6], atol=1e-6)


def test_gains_are_at_least_what_greed_guarantees():
    for seed in range(10):
        X = rows_of(10, d=3, seed=seed)
        gains = facility_location(X, 3)[1]
        best = max((X @ X[list(some)].T + 1).max(1).sum() for some in combinations(range(10), 3))
        assert (1 - 1 / np.e) * best <= gains.sum() <= best + 1e-9


def test_equal_candidates_are_left_to_the_end_and_ties_to_the_first(blocks):
    X = np.repeat(rows_of(12), 3, axis=0)
    picks, gains = facility_location(X, 36)
    assert (picks[:12] % 3 == 0).all() and len(set(picks)) == 36
    assert picks[12:24].tolist() == (picks[:12] + 1).tolist()
    np.testing.assert_allclose(gains[12:24], gains[:12])


def test_once_each_target_has_its_nearest_they_are_served_anew(blocks):
    X, T = rows_of(40), rows_of(3, seed=1)
    picks, gains = facility_location(X, 40, clients=T)
    assert len(set(picks)) == 40
    again = int(np.flatnonzero(np.diff(gains) > 1e-9)[0]) + 1
    np.testing.assert_allclose((T @ X[picks[:again]].T).max(1), (T @ X.T).max(1))
    rest = np.setdiff1d(np.arange(40), picks[:again])
    following = facility_location(X[rest], len(rest), clients=T)[0]
    assert picks[again:].tolist() == rest[following].tolist()


def test_clients_of_other_width_are_refused():
    with pytest.raises(ValueError, match="8 features but clients 3"):
        facility_location(rows_of(), 3, clients=rows_of(d=3))


def test_facilities_for_the_targets_are_nearer_to_them():
    def served(name):
        rows = np.searchsorted(POOL.ids, ids(name, 5))
        centre = POOL.sketches.mean(0)
        X, T = POOL.sketches[rows] - centre, TARGET.sketches - centre
        X /= np.linalg.norm(X, axis=1, keepdims=True)
        return (T / np.linalg.norm(T, axis=1, keepdims=True) @ X.T).max(1).mean()

    assert served("facility_target") > served("facility")
