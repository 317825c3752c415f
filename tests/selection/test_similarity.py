"""Similarity to the targets: exact on small cases, whatever all sketches share."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dsel_assets.data.examples import Examples
from dsel_assets.selection import Budget, Constraints
from dsel_assets.selection.similarity import (
    Cosine,
    InformationDensity,
    information_density,
    mean_cosine,
)
from dsel_assets.selection.uncertainty import Entropy

FEATURES, CLASSES, D, ROWS = 5, 3, 12, 50


def build():
    torch.manual_seed(0)
    return nn.Linear(FEATURES, CLASSES)


def examples(rows, seed, prefix):
    rng = np.random.default_rng(seed)
    return Examples(
        ids=np.array([f"{prefix}{i:03d}" for i in range(rows)]),
        labels=rng.integers(0, CLASSES, rows),
        groups=rng.choice(["web", "book"], rows),
        inputs=rng.standard_normal((rows, FEATURES)).astype(np.float32),
        sketches=(rng.standard_normal((rows, D)) + 1).astype(np.float32),
    )


POOL, TARGET = examples(ROWS, 0, "p"), examples(8, 1, "t")
MADE = {"cosine": Cosine, "density": lambda: InformationDensity(model=build)}
both = pytest.mark.parametrize("name", MADE)


def select(name, n, pool=POOL, target=TARGET, using=None, **constraints):
    selector = using or MADE[name]()
    constrained = Constraints(**constraints)
    return selector.select(pool, target, Budget(n), seed=0, constraints=constrained)


def ids(*args, **given):
    return select(*args, **given).ids.tolist()


def brute_cosines(X, T):
    return np.array([np.mean([x @ t / np.sqrt((x @ x) * (t @ t)) for t in T]) for x in X])


def centred(pool=POOL, target=TARGET):
    centre = pool.sketches.mean(0, dtype=np.float64)
    return pool.sketches - centre, target.sketches - centre


# The scores


def test_mean_cosine_is_its_definition():
    np.testing.assert_allclose(mean_cosine(*centred()), brute_cosines(*centred()), atol=1e-12)
    X, T = centred()
    X[3] = 0
    assert mean_cosine(X, T)[3] == 0
    assert mean_cosine(X, X[:1]).argmax() == 0
    as_tensors = mean_cosine(torch.from_numpy(X), torch.from_numpy(T))
    np.testing.assert_array_equal(as_tensors, mean_cosine(X, T))


@pytest.mark.parametrize("d", [12, 64, 1000])
def test_equal_rows_have_equal_cosines_wherever_they_lie(d):
    X, T = (np.random.default_rng(seed).standard_normal((8, d)) for seed in (0, 1))
    assert len(np.unique(mean_cosine(np.repeat(X[:1], 999, axis=0), T))) == 1


def test_density_is_the_product_and_rises_with_both():
    entropy, cosine = np.array([0.0, 0.5, 1.0]), np.array([0.5, -0.5, 0.25])
    np.testing.assert_allclose(information_density(entropy, cosine), [0, -0.25, 0.25])
    np.testing.assert_allclose(information_density(entropy, cosine, 2.0), [0, -0.125, 0.0625])
    steps = np.linspace(-1, 1, 41)
    for beta in (0.5, 1.0, 2.0, 3.0):
        assert (np.diff(information_density(np.ones(41), steps, beta)) > 0).all()
    for beta in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match=r"beta = .* positive"):
            information_density(entropy, cosine, beta)


# The strategies


def test_cosine_takes_the_nearest_to_the_targets():
    wanted = np.argsort(-brute_cosines(*centred()))
    assert ids("cosine", ROWS) == POOL.ids[wanted].tolist()


def test_density_is_of_entropy_and_cosine():
    found = select("density", ROWS)
    of = {}
    for name, selector in (("uncertainty", Entropy(model=build)), ("cosine", Cosine())):
        whole = selector.select(POOL, TARGET, Budget(ROWS), seed=0)
        of[name] = dict(zip(whole.ids, whole.scores[name], strict=True))
    wanted = [of["uncertainty"][i] * of["cosine"][i] for i in found.ids]
    np.testing.assert_allclose(found.scores["density"], wanted)
    assert (np.diff(found.scores["density"]) <= 0).all()


@both
def test_what_all_sketches_share_and_their_lengths_do_not_matter(name):
    X, T = centred()
    scale = np.random.default_rng(3).uniform(0.1, 10, (len(T), 1))
    moved = replace(POOL, sketches=5 * X + 7), replace(TARGET, sketches=scale * T * 5 + 7)
    assert ids(name, ROWS) == ids(name, ROWS, *moved)


@both
def test_budgets_are_prefixes_and_order_does_not_matter(name):
    whole = ids(name, ROWS)
    shuffled = POOL.take(np.random.default_rng(2).permutation(ROWS))
    for n in (1, 9, ROWS - 1):
        assert ids(name, n) == ids(name, n, shuffled) == whole[:n]
    assert ids(name, ROWS, target=TARGET.take([5, 2, 7, 0, 1, 3, 6, 4])) == whole


@both
def test_quotas_take_the_first_of_each_in_the_order_of_the_whole(name):
    order = ids(name, ROWS)
    group = dict(zip(POOL.ids, POOL.groups, strict=True))
    found = ids(name, 12, quotas={"group": {"web": 2}})
    assert found == sorted(found, key=order.index)
    for value, count in (("web", 2), ("book", 10)):
        assert [i for i in found if group[i] == value] == [i for i in order if group[i] == value][
            :count
        ]


def test_other_sketches_are_another_ranking_and_the_model_is_read_once():
    calls = []
    once = InformationDensity(model=lambda: calls.append(1) or build())
    first = ids("density", 20, using=once)
    assert ids("density", 9, using=once) == first[:9] and len(calls) == 1
    other = replace(POOL, sketches=-POOL.sketches)
    assert ids("density", 20, other, using=once) == ids("density", 20, other) != first
    nearer = replace(TARGET, sketches=TARGET.sketches[::-1] * [[3.0]] * 8 - 4)
    assert ids("density", 20, target=nearer, using=once) == ids("density", 20, target=nearer)


@both
@pytest.mark.parametrize("rows", [1, 2])
def test_the_smallest_pools(name, rows):
    assert ids(name, rows, POOL.take(np.arange(rows)), TARGET.take([0])) != []


@both
def test_equal_rows_come_by_id(name):
    same = replace(
        POOL,
        inputs=np.repeat(POOL.inputs[:1], ROWS, axis=0),
        sketches=np.repeat(POOL.sketches[:1], ROWS, axis=0),
    )
    assert ids(name, 7, same) == POOL.ids[:7].tolist()
