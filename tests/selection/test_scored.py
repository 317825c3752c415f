"""Baselines that score each example: what they rank by, and what holds for budgets and quotas."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

from dsel_assets.data.examples import Examples
from dsel_assets.selection import Budget, Constraints
from dsel_assets.selection.confident import Confident, label_quality, out_of_fold
from dsel_assets.selection.scored import places
from dsel_assets.selection.smallloss import SmallLoss, target_losses

FEATURES, CLASSES = 6, 4
FAST = {"steps": 60, "batch_size": 20, "lr": 1e-2}


def examples(rows, noise=0.0, seed=0, prefix="p"):
    """Separated clusters, a share of whose labels moved on by one; groups say which."""
    rng = np.random.default_rng(seed)
    true = rng.permutation(np.arange(rows) % CLASSES)
    centres = 3 * np.eye(CLASSES, FEATURES)
    wrong = rng.random(rows) < noise
    return Examples(
        ids=np.array([f"{prefix}{i:03d}" for i in range(rows)]),
        labels=np.where(wrong, (true + 1) % CLASSES, true),
        groups=np.where(wrong, "wrong", "right"),
        inputs=(rng.standard_normal((rows, FEATURES)) + centres[true]).astype(np.float32),
    )


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def cleanlab(**settings):
    return Confident(model=build, **FAST, **settings)


def small_loss(**settings):
    return SmallLoss(model=build, **FAST, **settings)


POOL, TARGET = examples(200, noise=0.3), examples(40, seed=1, prefix="t")
both = pytest.mark.parametrize("selector", [small_loss, cleanlab])


def select(selector, n, pool=POOL, target=TARGET, seed=0, **constraints):
    given = {"constraints": Constraints(**constraints)} if constraints else {}
    return selector.select(pool, target, Budget(n), seed=seed, **given)


def tensors(pool):
    return torch.from_numpy(pool.inputs), torch.from_numpy(pool.labels)


# What they rank by


@both
def test_the_first_half_is_almost_free_of_wrong_labels(selector):
    found = select(selector(), 100)
    groups = POOL.groups[np.searchsorted(POOL.ids, found.ids)]
    assert (groups == "wrong").mean() < 0.05
    assert (POOL.groups == "wrong").mean() > 0.2


def test_losses_are_those_of_a_model_of_the_target_alone():
    model = build()
    losses = target_losses(model, tensors(POOL), tensors(TARGET), **FAST)
    wanted = F.cross_entropy(
        model(torch.from_numpy(POOL.inputs)), tensors(POOL)[1], reduction="none"
    )
    np.testing.assert_allclose(losses, wanted.detach(), rtol=1e-6)
    accuracy = (model(tensors(TARGET)[0]).argmax(1) == tensors(TARGET)[1]).float().mean()
    assert accuracy > 0.9
    shuffled = replace(POOL, labels=np.roll(POOL.labels, 1))
    again = build()
    target_losses(again, tensors(shuffled), tensors(TARGET), **FAST)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_small_losses_come_first_and_are_reported():
    found = select(small_loss(), 200)
    assert (np.diff(found.scores["loss"]) >= 0).all()
    middle = np.median(found.scores["loss"])
    assert found.diagnostics["median_loss"] == pytest.approx(middle)


def test_losses_of_hopeless_examples_differ():
    """A softmax in single precision would call them all infinite."""
    far = replace(POOL, inputs=1e3 * POOL.inputs)
    losses = target_losses(build(), tensors(far), tensors(TARGET), **FAST)
    assert np.isfinite(losses).all() and losses.max() > 200
    assert len(np.unique(losses[losses > 100])) == (losses > 100).sum()


def test_with_per_class_the_labels_take_turns_by_loss():
    found = select(small_loss(per_class=True), 40)
    rows = np.searchsorted(POOL.ids, found.ids)
    turns = POOL.labels[rows].reshape(10, CLASSES)
    assert (np.sort(turns, 1) == np.arange(CLASSES)).all()
    whole = select(small_loss(), 200)
    by_loss = dict(zip(whole.ids, whole.scores["loss"], strict=True))
    for label in range(CLASSES):
        ids = POOL.ids[POOL.labels == label]
        easiest = sorted(ids, key=by_loss.__getitem__)[:10]
        assert [i for i in found.ids if i in set(ids)] == easiest


def test_probabilities_are_out_of_fold():
    """A row's own label has no say in its probabilities, and that of other rows has."""
    inputs, labels = tensors(POOL)
    settings = {**FAST, "folds": 4, "seed": 3}
    before = out_of_fold(build, inputs, labels, **settings)
    np.testing.assert_allclose(before.sum(1), 1, rtol=1e-6)
    changed = labels.clone()
    changed[7] = (changed[7] + 1) % CLASSES
    after = out_of_fold(build, inputs, changed, **settings)
    moved = (before != after).any(1)
    assert not moved[7]
    # the other rows of its fold are scored by the same model, all others by one that saw it
    assert (~moved).sum() == len(POOL) // 4


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_fewer_rows_than_folds_leave_one_out(rows):
    inputs, labels = tensors(POOL)
    found = out_of_fold(build, inputs[:rows], labels[:rows], **FAST, folds=10)
    assert found.shape == (rows, CLASSES) and np.isfinite(found).all()


@pytest.mark.parametrize("rows, folds", [(1, 5), (0, 5), (9, 1)])
def test_too_little_to_hold_anything_out_is_refused(rows, folds):
    inputs, labels = tensors(POOL)
    with pytest.raises(ValueError, match="at least 2"):
        out_of_fold(build, inputs[:rows], labels[:rows], folds=folds)


def test_labels_thought_wrong_come_last_whatever_their_quality():
    found = select(cleanlab(), 200)
    wrong, quality = found.scores["thought_wrong"], found.scores["label_quality"]
    assert 0 < wrong.mean() == pytest.approx(found.diagnostics["share_thought_wrong"])
    assert (np.diff(wrong) >= 0).all()
    for part in (0, 1):
        assert (np.diff(quality[wrong == part]) <= 0).all()


def test_quality_separates_what_calibrated_probabilities_separate():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 3, 300)
    given = np.where(rng.random(300) < 0.2, (true + 1) % 3, true)
    probabilities = 0.9 * np.eye(3)[true] + 0.1 / 3
    for method in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
        quality, wrong = label_quality(given, probabilities, method=method)
        assert roc_auc_score(given == true, quality) == 1
        assert not wrong[given == true].any() and wrong[given != true].mean() > 0.9


# Budgets, quotas, order


@both
def test_budgets_are_prefixes_of_one_training(selector, monkeypatch):
    once = selector()
    largest = select(once, 150)
    monkeypatch.setattr(once, "model", lambda: pytest.fail("trained again"))
    for n in (1, 30, 149):
        found = select(once, n)
        assert found.ids.tolist() == largest.ids[:n].tolist()
        assert found.diagnostics["seconds"] >= once._last[2]  # the earlier work is not free


@both
def test_another_seed_target_or_label_is_another_ranking(selector):
    once = selector()
    first = select(once, 200).ids.tolist()
    assert select(once, 200, seed=1).ids.tolist() != first
    labels = POOL.labels.copy()
    labels[:5] = (labels[:5] + 1) % CLASSES
    changed = select(once, 200, pool=replace(POOL, labels=labels)).ids.tolist()
    assert changed != first
    assert select(once, 200).ids.tolist() == first


@both
def test_quotas_take_the_first_of_each_label_in_the_order_of_the_whole(selector):
    order = select(selector(), 200).ids.tolist()
    quotas = {"0": 3, "2": 11}
    found = select(selector(), 20, quotas={"label": quotas}).ids.tolist()
    label = dict(zip(POOL.ids, POOL.labels.astype(str), strict=True))
    for value, count in quotas.items():
        wanted = [i for i in order if label[i] == value][:count]
        assert [i for i in found if label[i] == value] == wanted
    others = [i for i in order if label[i] not in quotas]
    assert [i for i in found if label[i] not in quotas] == others[:6]
    assert found == sorted(found, key=order.index)


@both
@pytest.mark.parametrize("rows", [1, 2])
def test_the_smallest_pools(selector, rows):
    assert len(select(selector(), rows, pool=POOL.take(np.arange(rows))).ids) == rows


@pytest.mark.parametrize("values", [[], [3], [1, 1, 1], [2, 0, 2, 1, 0, 2]])
def test_places_count_what_stands_before(values):
    values = np.array(values, dtype=np.int64)
    wanted = [int((values[:i] == value).sum()) for i, value in enumerate(values)]
    assert places(values).tolist() == wanted
