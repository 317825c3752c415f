"""What holds for every strategy, whatever it chooses by."""

import time
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dsel_assets.data.examples import Examples
from dsel_assets.selection import (
    STRATEGIES,
    Budget,
    Constraints,
    Needs,
    make_selector,
)
from dsel_assets.selection.baselines import Random

ROWS, FEATURES, CLASSES, D = 40, 6, 3, 16
CHOOSING = [name for name, selector in STRATEGIES.items() if not selector.whole]
FAST = {
    "bads": {"steps": 30, "batch_size": 16},
    "bads_joint": {"steps": 30, "batch_size": 16},
    "smallloss": {"steps": 20, "batch_size": 3, "lr": 0.05},
    "cleanlab": {"steps": 20, "folds": 2},
}
every = pytest.mark.parametrize("name", STRATEGIES)
choosing = pytest.mark.parametrize("name", CHOOSING)


def reading(need):
    names = [name for name, selector in STRATEGIES.items() if need in selector.needs]
    return pytest.mark.parametrize("name", names)


def examples(rows, seed=0, prefix="e"):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, rows)
    inputs = (rng.standard_normal((rows, FEATURES)) + 2 * labels[:, None]).astype(np.float32)
    projection = np.random.default_rng(99).standard_normal((FEATURES, D))
    return Examples(
        ids=np.array([f"{prefix}{i:03d}" for i in rng.permutation(rows)]),
        labels=labels,
        groups=np.full(rows, ""),
        inputs=inputs,
        sketches=(inputs @ projection + rng.standard_normal((rows, D))).astype(np.float32),
    )


POOL, TARGET = examples(ROWS), examples(6, seed=1, prefix="t")


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def selector(name):
    trainable = [key for key, _ in build().named_parameters()]
    return make_selector(name, FAST.get(name, {}), model=build, trainable=trainable)


def select(name, n, pool=POOL, target=TARGET, seed=0, using=None, **given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what skmm says of a c out of reach
        return (using or selector(name)).select(pool, target, Budget(n), seed=seed, **given)


def chosen(*args, **given):
    return select(*args, **given).ids.tolist()


def expected_size(name, n, rows=ROWS):
    return {"full": rows, "bads_joint": rows, "target_only": 0}.get(name, min(n, rows))


def check(selection, size, pool=POOL):
    assert len(selection.ids) == len(set(selection.ids)) == size
    assert set(selection.ids) <= set(pool.ids)
    assert selection.weights.shape == (size,) and selection.weights.dtype == np.float64
    assert size == 0 or selection.weights.mean() == pytest.approx(1)
    for column in selection.scores.values():
        assert len(column) == size
    np.testing.assert_array_equal(selection.scores["rank"], np.arange(1, size + 1))
    assert selection.diagnostics["seconds"] >= 0


# Budgets


@every
@pytest.mark.parametrize("n", [0, 1, 2, ROWS // 2, ROWS - 1, ROWS])
def test_as_many_are_chosen_as_asked_for(name, n):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*takes all.*")
        selection = selector(name).select(POOL, TARGET, Budget(n), seed=0)
    check(selection, expected_size(name, n))


@every
@pytest.mark.parametrize("n", [ROWS + 1, 10 * ROWS])
def test_more_than_there_are_takes_everything_and_warns(name, n):
    if name == "target_only":
        check(select(name, n), 0)
        return
    with pytest.warns(UserWarning, match=f"{name}: a budget of {n} takes all {ROWS} examples"):
        selection = selector(name).select(POOL, TARGET, Budget(n), seed=0)
    check(selection, ROWS)


@every
@pytest.mark.parametrize("n", [-1, -0.5, 2.5, float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_of_examples_is_refused(name, n):
    with pytest.raises(ValueError, match="whole number of examples"):
        select(name, n)


@every
def test_a_whole_float_is_a_number_of_examples(name):
    assert chosen(name, 5.0) == chosen(name, 5)


# Budgets in costs


TOKENS = np.random.default_rng(5).integers(1, 30, ROWS).astype(float)
PRICED = replace(POOL, columns={"tokens": TOKENS})
PRICE = dict(zip(POOL.ids.tolist(), TOKENS.tolist(), strict=True))


def paid(name, limit, pool=PRICED, **given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        budget = Budget(limit, cost="tokens")
        return selector(name).select(pool, TARGET, budget, seed=0, **given)


@choosing
@pytest.mark.parametrize("limit", [60, 250.5])
def test_a_cost_budget_is_spent_and_not_exceeded(name, limit):
    selection = paid(name, limit)
    check(selection, len(selection.ids))
    spent = sum(PRICE[one] for one in selection.ids)
    assert limit / 2 < spent <= limit
    if STRATEGIES[name].nested:
        # the choice of so many examples, which ends before the first that does not fit
        affordable = PRICED.take(limit >= TOKENS)
        more = chosen(name, len(selection.ids) + 1, affordable)
        assert more[:-1] == selection.ids.tolist()
        assert spent + PRICE[more[-1]] > limit


@every
def test_cost_budgets_at_their_ends(name):
    whole = expected_size(name, ROWS)
    assert len(paid(name, TOKENS.sum()).ids) == len(paid(name, 1e9).ids) == whole
    if not STRATEGIES[name].whole:
        assert len(paid(name, 0).ids) == len(paid(name, 0.5).ids) == 0
        free = replace(PRICED, columns={"tokens": np.zeros(ROWS)})
        assert len(paid(name, 0, free).ids) == ROWS


def test_a_nested_choice_ends_where_the_budget_does_however_costs_lie():
    """Cheap rows behind dear ones: the first sizes that are tried are far too small."""
    rows, order = 3000, Random()
    pool = Examples(
        ids=np.array([f"e{i:05d}" for i in range(rows)]),
        labels=np.zeros(rows, np.int64),
        groups=np.full(rows, ""),
    )
    ranked = order.select(pool, None, Budget(rows), seed=0).ids
    place = dict(zip(ranked.tolist(), range(rows), strict=True))
    at = np.array([place[one] for one in pool.ids])
    costs = np.where(at < 10, 9.0, np.where(at < 2000, 0.0005, 5.0))
    priced = replace(pool, columns={"tokens": costs})
    found = order.select(priced, None, Budget(100, cost="tokens"), seed=0)
    assert len(found.ids) == 2000 + int((100 - 90 - 1990 * 0.0005) // 5)
    assert found.ids.tolist() == ranked[: len(found.ids)].tolist()


def test_work_before_a_cost_budget_is_counted_once():
    class Slow(Random):
        def choose(self, pool, target, n, *, seed, warm):
            found = super().choose(pool, target, n, seed=seed, warm=warm)
            known = getattr(self, "known", False)
            self.known = True
            if not known:
                time.sleep(0.2)
            return replace(found, spent=0.2 if known else 0.0)

    started = time.perf_counter()
    found = Slow().select(PRICED, None, Budget(60, cost="tokens"), seed=0)
    took = time.perf_counter() - started
    assert 0.2 <= found.diagnostics["seconds"] <= took


@reading(Needs.SKETCHES)
def test_gradients_of_outputs_give_several_rows_an_example(name):
    def several(examples):
        return replace(examples, sketches=examples.sketches.reshape(len(examples), 2, D // 2))

    found = select(name, 5, several(POOL), several(TARGET))
    check(found, 5)


@choosing
def test_required_ids_are_paid_first(name):
    dearest = POOL.ids[np.argsort(-TOKENS)[:2]].tolist()
    bound = Constraints(required=frozenset(dearest))
    selection = paid(name, 100, constraints=bound)
    assert set(selection.ids[:2]) == set(dearest)
    assert sum(PRICE[one] for one in selection.ids) <= 100
    with pytest.raises(ValueError, match="they cost"):
        paid(name, 10, constraints=bound)


@every
def test_impossible_cost_budgets_are_refused(name):
    for limit in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number from 0"):
            paid(name, limit)
    with pytest.raises(ValueError, match="quotas under a cost budget"):
        paid(name, 9, constraints=Constraints(quotas={"label": {"0": 1}}))
    if not STRATEGIES[name].whole:
        with pytest.raises(ValueError, match="no column 'tokens'"):
            paid(name, 9, POOL)


# Pools


@every
def test_an_empty_pool_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: the pool is empty"):
        select(name, 3, POOL.take([]))


@every
@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_pool_of_one(name, n):
    check(select(name, n, POOL.take([3])), expected_size(name, n, 1))


@every
def test_a_pool_of_two(name):
    check(select(name, 1, POOL.take([3, 4])), expected_size(name, 1, 2))


@every
def test_one_class(name):
    pool = replace(POOL, labels=np.zeros(ROWS, dtype=np.int64))
    target = replace(TARGET, labels=np.zeros(len(TARGET), dtype=np.int64))
    for n in (1, 7, ROWS - 1):
        check(select(name, n, pool, target), expected_size(name, n))


@every
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_equal_rows(name, dtype):
    same = replace(
        POOL,
        inputs=np.repeat(POOL.inputs[:1], ROWS, axis=0),
        sketches=np.repeat(POOL.sketches[:1], ROWS, axis=0).astype(dtype),
        labels=np.zeros(ROWS, dtype=np.int64),
    )
    for n in (1, 7, ROWS - 1):
        check(select(name, n, same), expected_size(name, n))


@every
def test_some_rows_of_zeros(name):
    sketches = POOL.sketches.copy()
    sketches[5:15] = 0
    check(select(name, 35, replace(POOL, sketches=sketches)), expected_size(name, 35))


@every
def test_sketches_in_half_precision(name):
    pool, target = (replace(e, sketches=e.sketches.astype(np.float16)) for e in (POOL, TARGET))
    check(select(name, 10, pool, target), expected_size(name, 10))
    single = (replace(e, sketches=e.sketches.astype(np.float32)) for e in (pool, target))
    assert chosen(name, 10, pool, target) == chosen(name, 10, *single)


@reading(Needs.SKETCHES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_sketch_that_is_not_finite_is_refused_by_id(name, value, dtype):
    sketches = POOL.sketches.astype(dtype)
    sketches[7, 3] = value
    pool = replace(POOL, sketches=sketches)
    with pytest.raises(ValueError, match=f"1 rows of the pool are not finite: {POOL.ids[7]}"):
        select(name, 5, pool)


@reading(Needs.MODEL)
def test_an_input_that_is_not_finite_is_refused_by_id(name):
    read = {"pool": POOL, "target": TARGET}
    if Needs.TARGET not in STRATEGIES[name].needs:
        del read["target"]
    for what, given in read.items():
        inputs = given.inputs.copy()
        inputs[4, 1] = np.nan
        both = {"pool": POOL, "target": TARGET, what: replace(given, inputs=inputs)}
        with pytest.raises(ValueError, match=f"of the {what} are not finite: {given.ids[4]}"):
            select(name, 5, **both)


def test_a_target_row_that_is_not_finite_is_refused_by_id():
    sketches = TARGET.sketches.copy()
    sketches[2] = np.inf
    with pytest.raises(ValueError, match=f"of the target are not finite: {TARGET.ids[2]}"):
        select("itl", 5, target=replace(TARGET, sketches=sketches))


@every
def test_ids_that_repeat_are_refused(name):
    with pytest.raises(ValueError, match=f"{POOL.ids[2]}"):
        select(name, 5, POOL.take([*range(ROWS), 2]))


# What a strategy needs


@reading(Needs.TARGET)
@pytest.mark.parametrize("target", [None, TARGET.take([])])
def test_a_target_that_is_needed_is_asked_for(name, target):
    with pytest.raises(ValueError, match=f"{name} needs a target set"):
        select(name, 5, target=target)


@every
def test_a_target_that_is_not_needed_may_be_missing(name):
    if Needs.TARGET not in STRATEGIES[name].needs:
        expected = chosen(name, 5)
        assert chosen(name, 5, target=None) == expected
        assert chosen(name, 5, target=replace(TARGET, sketches=None, inputs=None)) == expected


@reading(Needs.SKETCHES)
def test_sketches_that_are_needed_are_asked_for(name):
    with pytest.raises(ValueError, match=f"{name} needs sketches of the pool"):
        select(name, 5, replace(POOL, sketches=None))


@reading(Needs.MODEL)
def test_inputs_that_are_needed_are_asked_for(name):
    with pytest.raises(ValueError, match=f"{name} needs inputs of the pool"):
        select(name, 5, replace(POOL, inputs=None))


@every
def test_nothing_else_is_read(name):
    needs = STRATEGIES[name].needs
    bare = POOL
    if Needs.SKETCHES not in needs:
        bare = replace(bare, sketches=None)
    if Needs.MODEL not in needs:
        bare = replace(bare, inputs=None)
    assert chosen(name, 5, bare) == chosen(name, 5)


# Determinism


@every
@pytest.mark.parametrize("n", [5, ROWS - 1, ROWS])
def test_the_same_seed_gives_the_same_ids(name, n):
    first, again = select(name, n, seed=3), select(name, n, seed=3)
    for column in first.scores:
        np.testing.assert_array_equal(first.scores[column], again.scores[column])
    assert first.ids.tolist() == again.ids.tolist()


@every
def test_the_order_of_the_pool_does_not_matter(name):
    for seed in range(3):
        shuffled = POOL.take(np.random.default_rng(seed).permutation(ROWS))
        assert chosen(name, 9, shuffled, seed=seed) == chosen(name, 9, seed=seed)


@every
def test_the_seed_matters_where_the_strategy_says_so(name):
    draws = {tuple(chosen(name, 9, seed=seed)) for seed in range(4)}
    assert len(draws) == 1 if STRATEGIES[name].deterministic else len(draws) > 1


@every
def test_nothing_is_left_of_the_calls_before(name):
    """A selector serves several budgets and seeds; each answer is that of a fresh one."""
    other_target = examples(6, seed=5, prefix="t")
    relabelled = replace(POOL, labels=(POOL.labels + 1) % CLASSES)
    calls = [
        {"n": 5, "seed": 0}, {"n": 9, "seed": 0}, {"n": 5, "seed": 1}, {"n": 5, "seed": 0},
        {"n": 9, "seed": 0, "pool": relabelled},
        {"n": 9, "seed": 0, "target": other_target},
        {"n": 9, "seed": 0, "constraints": Constraints(forbidden=frozenset(POOL.ids[:3]))},
        {"n": 9, "seed": 0},
    ]  # fmt: skip
    one = selector(name)
    for call in calls:
        assert chosen(name, using=one, **call) == chosen(name, **call)


@choosing
def test_the_global_generators_do_not_matter(name):
    np.random.seed(1)
    torch.manual_seed(1)
    first = chosen(name, 9)
    np.random.seed(2)
    torch.manual_seed(2)
    assert chosen(name, 9) == first


@every
def test_a_smaller_budget_is_a_prefix_where_the_strategy_says_so(name):
    if STRATEGIES[name].nested and not STRATEGIES[name].whole:
        everything = chosen(name, ROWS)
        for n in (0, 1, 5, 17, ROWS - 1):
            assert chosen(name, n) == everything[:n]


@every
def test_the_budget_matters_not_where_the_strategy_says_so(name):
    if STRATEGIES[name].whole:
        assert chosen(name, 1) == chosen(name, ROWS)


@every
def test_the_given_arrays_are_left_as_they_were(name):
    def bits(given):
        return [getattr(given, part).tobytes() for part in ("ids", "labels", "inputs", "sketches")]

    before = bits(POOL), bits(TARGET)
    select(name, 5, constraints=Constraints(forbidden=frozenset(POOL.ids[:2])))
    assert (bits(POOL), bits(TARGET)) == before


# Constraints


SOURCED = replace(POOL, groups=np.array(["web", "book", "book", "chat"] * (ROWS // 4)))


@choosing
@pytest.mark.parametrize("quotas", [{"web": 3}, {"web": 0, "book": 9}, {"web": 10, "chat": 2}])
def test_quotas_are_kept_to(name, quotas):
    selection = select(name, 12, SOURCED, constraints=Constraints(quotas={"group": quotas}))
    check(selection, 12, SOURCED)
    sources = dict(zip(SOURCED.ids, SOURCED.groups, strict=True))
    found = Counter(sources[example] for example in selection.ids)
    assert {value: found[value] for value in quotas} == quotas
    again = select(name, 12, SOURCED, constraints=Constraints(quotas={"group": quotas}))
    assert again.ids.tolist() == selection.ids.tolist()


@choosing
def test_required_ids_count_towards_the_quotas(name):
    required = frozenset(SOURCED.ids[SOURCED.groups == "web"][:2].tolist())
    bound = Constraints(quotas={"group": {"web": 3}}, required=required)
    selection = select(name, 12, SOURCED, constraints=bound)
    assert set(selection.ids[:2]) == required
    assert sum(SOURCED.groups[np.isin(SOURCED.ids, selection.ids)] == "web") == 3
    with pytest.raises(ValueError, match="more ids are required than the quotas of group"):
        select(name, 12, SOURCED, constraints=replace(bound, quotas={"group": {"web": 1}}))


@every
def test_quotas_that_cannot_be_honoured_are_refused_by_name(name):
    two = Constraints(quotas={"group": {"web": 3}, "label": {"0": 2}})
    with pytest.raises(ValueError, match=f"{name} can't honour quotas .*group, label"):
        select(name, 5, SOURCED, constraints=two)
    if STRATEGIES[name].whole:
        with pytest.raises(ValueError, match=f"{name} can't honour quotas"):
            select(name, 5, SOURCED, constraints=Constraints(quotas={"group": {"web": 3}}))
    else:
        with pytest.raises(ValueError, match="no column 'vendor'; it has label, group"):
            select(name, 5, SOURCED, constraints=Constraints(quotas={"vendor": {"web": 3}}))


@every
@pytest.mark.parametrize("n", [5, 20, ROWS])
def test_forbidden_ids_are_never_chosen(name, n):
    forbidden = frozenset(POOL.ids[::2].tolist())
    selection = select(name, n, constraints=Constraints(forbidden=forbidden))
    check(selection, expected_size(name, n, ROWS // 2))
    assert not forbidden & set(selection.ids)


@every
def test_forbidden_ids_are_as_if_they_were_not_there(name):
    forbidden = frozenset(POOL.ids[:10].tolist())
    kept = POOL.take(np.arange(10, ROWS))
    assert chosen(name, 8, constraints=Constraints(forbidden=forbidden)) == chosen(name, 8, kept)


@every
def test_with_everything_forbidden_there_is_no_pool(name):
    with pytest.raises(ValueError, match="the pool is empty"):
        select(name, 1, constraints=Constraints(forbidden=frozenset(POOL.ids.tolist())))


@choosing
@pytest.mark.parametrize("n", [4, 5, 12, ROWS - 1, ROWS])
def test_required_ids_are_chosen_first(name, n):
    required = frozenset(POOL.ids[[3, 11, 19, 30]].tolist())
    selection = select(name, n, constraints=Constraints(required=required))
    check(selection, n)
    assert set(selection.ids[:4]) == required


@every
def test_required_ids_that_do_not_fit_are_refused(name):
    required = Constraints(required=frozenset(POOL.ids[:4].tolist()))
    if name in ("full", "bads_joint"):
        check(select(name, 3, constraints=required), ROWS)
        return
    with pytest.raises(ValueError, match=f"{name} can't honour 4 required ids"):
        select(name, 3, constraints=required)


@every
def test_required_ids_that_are_unknown_or_forbidden_are_refused_by_id(name):
    with pytest.raises(ValueError, match="required ids are not in the pool: nobody"):
        select(name, 5, constraints=Constraints(required=frozenset({"nobody"})))
    both = frozenset({str(POOL.ids[4])})
    with pytest.raises(ValueError, match=str(POOL.ids[4])):
        select(name, 5, constraints=Constraints(required=both, forbidden=both))


@choosing
@pytest.mark.parametrize("n", [9, ROWS])
def test_scores_are_those_of_the_chosen_and_empty_for_the_required(name, n):
    required = frozenset(POOL.ids[[3, 11]].tolist())
    free, bound = select(name, n), select(name, n, constraints=Constraints(required=required))
    for column, values in bound.scores.items():
        if column != "rank":
            assert values.dtype.kind == free.scores[column].dtype.kind
            empty = {"f": np.isnan, "U": lambda v: v == "", "i": lambda v: v == -1}
            assert empty[values.dtype.kind](values[:2]).all()
            if values.dtype.kind == "f":
                assert np.isfinite(values[2:]).all()
