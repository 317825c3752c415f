"""Uncertainty sampling: what the measures are, and that only the base model's prediction counts."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from dsel_assets.data.examples import Examples
from dsel_assets.selection import Budget, Constraints
from dsel_assets.selection.uncertainty import (
    MEASURES,
    Entropy,
    LeastConfidence,
    Margin,
    class_probabilities,
    uncertainty,
)

FEATURES, CLASSES, ROWS = 5, 4, 60
SELECTORS = {"entropy": Entropy, "margin": Margin, "least_confidence": LeastConfidence}
each_measure = pytest.mark.parametrize("measure", MEASURES)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, CLASSES))


def pool(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    return Examples(
        ids=np.array([f"p{i:03d}" for i in range(rows)]),
        labels=rng.integers(0, CLASSES, rows),
        groups=rng.choice(["web", "book"], rows),
        inputs=3 * rng.standard_normal((rows, FEATURES)).astype(np.float32),
    )


POOL = pool()
P = np.random.default_rng(1).dirichlet(np.ones(CLASSES), 200)


def select(measure, n, given=POOL, using=None, **constraints):
    selector = using or SELECTORS[measure](model=build)
    constrained = Constraints(**constraints)
    return selector.select(given, None, Budget(n), seed=0, constraints=constrained)


# The measures


def test_they_are_their_definitions():
    first, second = np.sort(P, 1)[:, -1], np.sort(P, 1)[:, -2]
    np.testing.assert_allclose(uncertainty(P), scipy.stats.entropy(P, axis=1))
    np.testing.assert_allclose(uncertainty(P, "margin"), 1 - (first - second))
    np.testing.assert_allclose(uncertainty(P, "least_confidence"), 1 - first)


@each_measure
def test_the_even_prediction_is_most_unsure_and_the_certain_one_not_at_all(measure):
    even, certain = np.full((1, CLASSES), 1 / CLASSES), np.eye(CLASSES)[:1]
    assert uncertainty(certain, measure) == 0
    assert (uncertainty(P, measure) < uncertainty(even, measure)).all()
    assert (uncertainty(P, measure) > 0).all()


@each_measure
def test_the_order_of_the_classes_does_not_matter(measure):
    turned = P[:, np.random.default_rng(0).permutation(CLASSES)]
    np.testing.assert_array_equal(uncertainty(P, measure), uncertainty(turned, measure))


def test_of_two_classes_all_three_rank_alike():
    orders = [np.argsort(-uncertainty(P[:, :2] / P[:, :2].sum(1)[:, None], m)) for m in MEASURES]
    assert np.array_equal(orders[0], orders[1]) and np.array_equal(orders[0], orders[2])


@each_measure
def test_predictions_that_are_all_but_certain_still_differ(measure):
    logits = torch.zeros(30, CLASSES, dtype=torch.float64)
    logits[:, 0] = torch.linspace(1, 300, 30)
    found = uncertainty(logits.softmax(1), measure)
    assert (np.diff(found) < 0).all() and (found > 0).all()


@each_measure
def test_one_class_leaves_nothing_unsure(measure):
    assert (uncertainty(np.ones((3, 1)), measure) == 0).all()


@pytest.mark.parametrize(
    "given, message",
    [
        (P[:0], "not empty"),
        (P[0], "not empty"),
        (np.array([[0.5, np.nan]]), "not finite: 0"),
        (np.array([[1.5, -0.5]]), "below 0"),
    ],
)
def test_what_is_no_prediction_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        uncertainty(given)
    with pytest.raises(ValueError, match="there are entropy, margin, least_confidence"):
        uncertainty(P, "variance")


# The strategies


@each_measure
def test_the_least_sure_come_first(measure):
    found = select(measure, ROWS)
    rows = np.searchsorted(POOL.ids, found.ids)
    model = build().eval()
    with torch.no_grad():
        p = model(torch.from_numpy(POOL.inputs)).softmax(1).double().numpy()
    np.testing.assert_allclose(
        found.scores["uncertainty"], uncertainty(p, measure)[rows], rtol=1e-4
    )
    assert (np.diff(found.scores["uncertainty"]) <= 0).all()


@each_measure
def test_labels_and_target_are_not_read(measure):
    other = replace(POOL, labels=POOL.labels[::-1].copy())
    assert select(measure, 9).ids.tolist() == select(measure, 9, other).ids.tolist()


@each_measure
def test_budgets_are_prefixes_of_one_forward_pass(measure, monkeypatch):
    once = SELECTORS[measure](model=build)
    largest = select(measure, 40, using=once).ids.tolist()
    monkeypatch.setattr(once, "model", lambda: pytest.fail("read again"))
    for n in (1, 17, ROWS - 1):
        found = select(measure, n, using=once).ids.tolist()
        assert found[:40] == largest[:n]


@each_measure
def test_the_order_of_the_pool_does_not_matter(measure):
    shuffled = POOL.take(np.random.default_rng(2).permutation(ROWS))
    assert select(measure, 9).ids.tolist() == select(measure, 9, shuffled).ids.tolist()


@each_measure
def test_equal_rows_come_by_id(measure):
    # zeros, so that the outputs are equal too: products of equal rows may round otherwise
    same = replace(POOL, inputs=np.zeros_like(POOL.inputs))
    assert select(measure, 7, same).ids.tolist() == POOL.ids[:7].tolist()


@each_measure
def test_quotas_take_the_first_of_each_in_the_order_of_the_whole(measure):
    order = select(measure, ROWS).ids.tolist()
    group = dict(zip(POOL.ids, POOL.groups, strict=True))
    found = select(measure, 10, quotas={"group": {"web": 3}}).ids.tolist()
    assert found == sorted(found, key=order.index)
    assert [i for i in found if group[i] == "web"] == [i for i in order if group[i] == "web"][:3]


def test_outputs_that_are_not_finite_are_refused_by_row():
    model = nn.Linear(FEATURES, CLASSES)
    inputs = torch.ones(3, FEATURES)
    inputs[1] = 3e38
    with torch.no_grad():
        model.weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"outputs of the model has .* not finite"):
        class_probabilities(model, inputs)
