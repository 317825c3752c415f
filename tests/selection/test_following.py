"""After an arrival: what was chosen and what has come are looked at, nothing else, and no worse."""

from dataclasses import replace

import numpy as np
import pytest

from dsel_assets.data.examples import Examples
from dsel_assets.selection import STRATEGIES, Budget, Constraints, make_selector
from dsel_assets.selection.moments import reduce_sketches, second_moment

D, N, NEW, n = 24, 300, 25, 40
FOLLOWING = [name for name, strategy in STRATEGIES.items() if strategy.follows]
SETTINGS = [(name, {}) for name in FOLLOWING] + [("skmm", {"solver": "convex"})]
following = pytest.mark.parametrize("name, settings", SETTINGS)


def examples(rows, seed, prefix):
    rng = np.random.default_rng(seed)
    return Examples(
        ids=np.array([f"{prefix}{i:03d}" for i in rng.permutation(rows)]),
        labels=rng.integers(0, 3, rows),
        groups=np.full(rows, ""),
        sketches=(rng.standard_normal((rows, D)) * np.logspace(0, -1, D)).astype(np.float32),
    )


def both(one, other):
    return Examples(
        *(np.concatenate([getattr(e, f) for e in (one, other)]) for f in ("ids", "labels")),
        groups=np.full(len(one) + len(other), ""),
        sketches=np.concatenate([one.sketches, other.sketches]),
    )


POOL, CAME, TARGET = examples(N, 0, "m"), examples(NEW, 1, "c"), examples(9, 2, "t")
NOBODY = CAME.take([])


def select(name, settings, pool, warm=None, seed=0, budget=n):
    selector = make_selector(name, settings, model=None, trainable=())
    return selector.select(pool, TARGET, Budget(budget), seed=seed, warm=warm)


def part(first, came=CAME):
    """What the state names, and what has come."""
    return both(POOL.take(np.isin(POOL.ids, first.state["ids"])), came)


@following
def test_without_anything_new_nothing_changes(name, settings):
    first = select(name, settings, POOL)
    again = select(name, settings, part(first, NOBODY), first.state)
    assert sorted(again.ids) == sorted(first.ids)
    if name != "skmm":  # what it began with stands first, then what was drawn
        assert again.ids.tolist() == first.ids.tolist()
        np.testing.assert_allclose(again.scores[gain := GAIN[name]], first.scores[gain], rtol=1e-6)


GAIN = {"itl": "gain", "gradmatch": "score"}


@following
def test_it_is_no_worse_than_what_it_goes_on_from(name, settings):
    first = select(name, settings, POOL)
    later = select(name, settings, part(first), first.state)
    assert set(later.ids) <= set(first.state["ids"]) | set(CAME.ids) and len(later.ids) == n
    strategy = STRATEGIES[name]
    if not strategy.aim or settings:  # a draw from weights may be worse by chance
        return
    selector = make_selector(name, settings, model=None, trainable=())
    whole = both(POOL, CAME)
    before, after = (
        selector.objective(whole.take(np.isin(whole.ids, found.ids)), TARGET, later)
        for found in (first, later)
    )
    assert after <= before * (1 + 1e-9) if strategy.lower else after >= before * (1 - 1e-9)


def test_gradmatch_chooses_as_if_it_had_looked_at_everything():
    entered = []
    for how in ("cosine", "dot"):
        first = select("gradmatch", {"how": how}, POOL)
        later = select("gradmatch", {"how": how}, part(first), first.state)
        cold = select("gradmatch", {"how": how}, both(POOL, CAME))
        assert later.ids.tolist() == cold.ids.tolist()
        entered.append(np.isin(later.ids, CAME.ids).any())
        np.testing.assert_allclose(later.scores["score"], cold.scores["score"])
    assert any(entered)


def test_trak_begins_anew():
    """Its scores rest on the Fisher matrix of the whole pool."""
    assert not select("gradmatch", {"how": "trak"}, POOL).state


def test_itl_keeps_its_picks_until_something_new_is_worth_more():
    """Near the targets everything is new: it comes first. Far from them nothing is taken."""
    first = select("itl", {}, POOL)
    near = replace(CAME.take(range(9)), sketches=TARGET.sketches)
    later = select("itl", {}, part(first, near), first.state)
    assert np.isin(later.ids[:9], near.ids).all()
    centre = first.state["centre"].astype(np.float32)
    nothing = replace(CAME, sketches=np.tile(centre, (NEW, 1)))
    same = select("itl", {}, part(first, nothing), first.state)
    assert same.ids.tolist() == first.ids.tolist()


@pytest.mark.parametrize("settings", [{}, {"solver": "convex"}])
def test_skmm_is_held_against_the_whole_pool(settings):
    first = select("skmm", settings, POOL)
    later = select("skmm", settings, part(first), first.state)
    whole = both(POOL, CAME)
    reduced = reduce_sketches(whole.sketches, n, len(later.state["moment"]))
    np.testing.assert_allclose(later.state["moment"], second_moment(reduced), rtol=1e-6)
    assert int(later.state["rows"]) == N + NEW
    uniform = [f"uniform_{name}" for name in ("trace_score", "rank", "missed")]
    assert [later.diagnostics[k] for k in uniform] == [first.diagnostics[k] for k in uniform]
    third = select("skmm", settings, part(later, NOBODY), later.state)
    np.testing.assert_allclose(third.state["moment"], later.state["moment"], rtol=1e-12)


def test_skmm_exchanges_only_where_that_lowers_the_trace():
    first = select("skmm", {}, POOL)
    later = select("skmm", {}, part(first), first.state)
    said = later.diagnostics
    assert said["exchanges"] == len(set(later.ids) - set(first.ids)) > 0
    assert said["trace_score"] < said["trace_before_exchanges"]


@following
def test_what_was_passed_over_is_refused(name, settings):
    """Its moment is in the state already: it would count twice."""
    first = select(name, settings, POOL)
    with pytest.raises(ValueError, match="without what was passed over"):
        select(name, settings, both(POOL, CAME), first.state)
    later = select(name, settings, part(first), first.state)
    with pytest.raises(ValueError, match="without what was passed over"):
        select(name, settings, both(POOL, CAME), later.state)


@following
def test_a_choice_under_constraints_leaves_nothing_to_go_on_from(name, settings):
    selector = make_selector(name, settings, model=None, trainable=())
    for bound in (
        Constraints(quotas={"label": {"0": 3}}),
        Constraints(required=frozenset([POOL.ids[0]])),
        Constraints(forbidden=frozenset([POOL.ids[0]])),
    ):
        found = selector.select(POOL, TARGET, Budget(n), constraints=bound, seed=0)
        assert not selector.can_go_on(found.state)
        if found.state:
            with pytest.raises(ValueError, match="under constraints can't be gone on from"):
                select(name, settings, part(found), found.state)


@following
def test_row_order_does_not_matter(name, settings):
    first = select(name, settings, POOL)
    handed = part(first)
    order = np.random.default_rng(5).permutation(len(handed))
    found = [select(name, settings, p, first.state) for p in (handed, handed.take(order))]
    assert found[0].ids.tolist() == found[1].ids.tolist()
