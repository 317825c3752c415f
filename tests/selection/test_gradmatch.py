"""Properties of the choice by likeness to the target's gradients."""

from dataclasses import replace

import numpy as np
import pytest

from dsel_assets.data.examples import Examples
from dsel_assets.selection import Budget, Constraints, attribution
from dsel_assets.selection.gradmatch import Gradmatch

HOW = ("dot", "cosine", "trak")
every = pytest.mark.parametrize("how", HOW)


def examples(sketches, labels=None, prefix="p"):
    sketches = np.asarray(sketches)
    return Examples(
        ids=np.array([f"{prefix}{i:03d}" for i in range(len(sketches))]),
        labels=np.zeros(len(sketches), np.int64) if labels is None else np.asarray(labels),
        groups=np.full(len(sketches), ""),
        sketches=sketches,
    )


def drawn(rows=80, targets=12, classes=3, D=10, seed=0):
    rng = np.random.default_rng(seed)
    return (
        examples(rng.standard_normal((rows, D)).astype(np.float32), rng.integers(0, 9, rows)),
        examples(
            rng.standard_normal((targets, D)).astype(np.float32),
            rng.permutation(np.arange(targets) % classes),
            "t",
        ),
    )


def select(pool, target, n, constraints=None, **settings):
    given = {"constraints": constraints} if constraints else {}
    return Gradmatch(**settings).select(pool, target, Budget(n), seed=0, **given)


def by_the_definition(pool, target, n, **settings):
    """Each class in turn looks at every example that is left."""
    scores = attribution(pool.sketches, target.sketches, **settings)
    left, rows = list(range(len(pool))), []
    classes = sorted(set(target.labels.tolist()))
    for turn in range(n):
        mean = scores[:, target.labels == classes[turn % len(classes)]].mean(1)
        rows.append(max(left, key=lambda row: mean[row]))
        left.remove(rows[-1])
    return pool.ids[rows].tolist()


def angles(*degrees):
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_a_small_case_by_hand():
    pool = examples([[1, 1], [9, 1], [1, 9], [-1, 0], [4, 1], [0, 0]])
    target = examples([[2, 0], [0, 1], [0, 3]], [7, 2, 2], "t")
    found = select(pool, target, 5)
    # class 2 points up, class 7 to the right; the row of zeros scores 0
    assert found.ids.tolist() == ["p002", "p001", "p000", "p004", "p003"]
    assert found.scores["taken_by"].tolist() == [2, 7, 2, 7, 2]
    assert found.scores["taken_by"].dtype == np.int64
    assert found.scores["nearest_target"].tolist() == ["t001", "t000", "t000", "t000", "t001"]
    wanted = [9 / 82**0.5, 9 / 82**0.5, 0.5**0.5, 4 / 17**0.5, 0]
    np.testing.assert_allclose(found.scores["score"], wanted, atol=1e-15)
    assert found.diagnostics["lowest_score"] == 0
    assert found.diagnostics["mean_score"] == pytest.approx(np.mean(wanted))
    by_length = select(pool, target, 3, how="dot")
    assert by_length.ids.tolist() == ["p002", "p001", "p000"]


@every
@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("n", [1, 7, 79, 80])
def test_picks_are_those_of_the_definition(how, classes, n):
    pool, target = drawn(classes=classes)
    found = select(pool, target, n, how=how, damping=0.3)
    assert found.ids.tolist() == by_the_definition(pool, target, n, how=how, damping=0.3)


@every
def test_without_turns_the_highest_mean_scores_are_taken(how):
    pool, target = drawn()
    found = select(pool, target, 20, how=how, round_robin=False)
    mean = attribution(pool.sketches, target.sketches, how=how).mean(1)
    assert found.ids.tolist() == pool.ids[np.argsort(-mean)[:20]].tolist()
    np.testing.assert_allclose(found.scores["score"], np.sort(mean)[::-1][:20], rtol=1e-9)
    assert "taken_by" not in found.scores


@every
def test_one_class_needs_no_turns(how):
    pool, target = drawn(classes=1)
    turns, none = (select(pool, target, 30, how=how, round_robin=r) for r in (True, False))
    assert turns.ids.tolist() == none.ids.tolist()
    assert set(turns.scores["taken_by"]) == {0}


@pytest.mark.parametrize("n", [1, 2, 4, 5, 17])
def test_every_class_has_its_share_however_many_targets_it_has(n):
    """One class with one target, and a pool that is all like the other one."""
    pool = examples(angles(*np.linspace(-5, 5, 40)))
    target = examples(angles(90, *np.linspace(-3, 3, 9)), [1] + [4] * 9, "t")
    takers = select(pool, target, n).scores["taken_by"].tolist()
    assert takers == ([1, 4] * n)[:n]
    assert abs(takers.count(1) - takers.count(4)) <= 1


def test_a_class_takes_its_best_first_and_what_another_took_is_passed_over():
    pool = examples(angles(45, 44, 10, 80))
    target = examples(angles(0, 44.4), [0, 1], "t")
    # class 0 takes p002 (10 degrees); class 1 p001, then class 0 the next best p000
    assert select(pool, target, 4).ids.tolist() == ["p002", "p001", "p000", "p003"]


def test_a_smaller_budget_is_a_prefix_with_its_scores():
    pool, target = drawn()
    for how in HOW:
        whole = select(pool, target, 80, how=how)
        for n in (1, 2, 3, 40, 79):
            part = select(pool, target, n, how=how)
            assert part.ids.tolist() == whole.ids[:n].tolist()
            assert np.array_equal(part.scores["score"], whole.scores["score"][:n])
            assert np.array_equal(part.scores["taken_by"], whole.scores["taken_by"][:n])
            assert np.array_equal(part.scores["nearest_target"], whole.scores["nearest_target"][:n])


@every
@pytest.mark.parametrize("D", [2, 64, 100])
@pytest.mark.parametrize("round_robin", [True, False])
def test_equal_rows_go_by_id(how, D, round_robin):
    """Though their scores differ in the last bits: a matrix product treats its edges otherwise."""
    rng = np.random.default_rng(0)
    pool = examples(np.repeat(rng.standard_normal((3, D)), 17, axis=0))
    target = examples(rng.standard_normal((7, D)), np.arange(7) % 2, "t")
    found = select(pool, target, 51, how=how, round_robin=round_robin).ids.tolist()
    for copies in (pool.ids[start : start + 17].tolist() for start in (0, 17, 34)):
        assert [row for row in found if row in copies] == copies


def test_lengths_do_not_matter_to_cosines():
    pool, target = drawn()
    rng = np.random.default_rng(1)
    longer, far = (
        replace(e, sketches=e.sketches * rng.lognormal(0, 2, (len(e), 1))) for e in (pool, target)
    )
    ids = select(pool, target, 40).ids.tolist()
    assert select(longer, far, 40).ids.tolist() == ids
    assert select(longer, far, 40, how="dot").ids.tolist() != ids


def test_the_order_of_the_targets_does_not_matter():
    pool, target = drawn()
    moved = target.take(np.random.default_rng(2).permutation(len(target)))
    for how in HOW:
        one, other = select(pool, target, 40, how=how), select(pool, moved, 40, how=how)
        assert one.ids.tolist() == other.ids.tolist()
        assert one.scores["nearest_target"].tolist() == other.scores["nearest_target"].tolist()


def test_the_labels_of_the_pool_are_not_read():
    pool, target = drawn()
    relabelled = replace(pool, labels=pool.labels[::-1].copy())
    assert select(pool, target, 9).ids.tolist() == select(relabelled, target, 9).ids.tolist()


def test_more_classes_than_picks_and_more_classes_than_rows():
    pool, target = drawn(rows=5, targets=40, classes=20)
    assert select(pool, target, 3).scores["taken_by"].tolist() == [0, 1, 2]
    assert sorted(select(pool, target, 5).ids) == pool.ids.tolist()


def test_a_pool_or_a_target_without_direction():
    pool, target = drawn()
    for how in HOW:
        for given in (
            (replace(pool, sketches=0 * pool.sketches), target),
            (pool, replace(target, sketches=0 * target.sketches)),
        ):
            found = select(*given, 7, how=how)
            assert found.ids.tolist() == pool.ids[:7].tolist()
            assert not found.scores["score"].any() and not found.scores["nearest_cosine"].any()


def test_required_rows_have_no_taker():
    pool, target = drawn()
    bound = select(pool, target, 6, Constraints(required=frozenset({"p003"})))
    assert bound.ids[0] == "p003" and bound.scores["taken_by"].tolist() == [-1, 0, 1, 2, 0, 1]


@every
def test_the_unit_of_the_sketches_does_not_matter(how):
    pool, target = drawn()
    scaled = (replace(e, sketches=e.sketches * np.float32(2.0**40)) for e in (pool, target))
    ids = select(pool, target, 30, how=how).ids.tolist()
    assert select(*scaled, 30, how=how).ids.tolist() == ids


def test_a_setting_that_is_no_score_is_refused():
    pool, target = drawn()
    with pytest.raises(ValueError, match="dot, cosine, trak"):
        select(pool, target, 3, how="less")
    with pytest.raises(ValueError, match="damping"):
        select(pool, target, 3, how="trak", damping=0)
