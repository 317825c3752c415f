"""One example after the other: scores and gains against inverses, whatever the form of the rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsel_assets.selection.moments import moment_diagnostics, second_moment
from dsel_assets.selection.pivoting import Urn
from dsel_assets.selection.sequential import Design, select_sequential
from dsel_assets.selection.strata import Strata

SIGMAS = 4.5  # of a hundred counts, chance alone goes this far once in a thousand runs


def pool(N, m, k=None, *, decay=1.0, seed=0):
    shape = (N, m) if k is None else (N, k, m)
    return np.random.default_rng(seed).standard_normal(shape) * np.logspace(0, -decay, m)


def blocks(G):
    return G if G.ndim == 3 else G[:, None]


def raw(G, rows):
    return np.einsum("nki,nkj->ij", blocks(G)[rows], blocks(G)[rows])


def trace(G, rows):
    """tr(Sigma (n Sigma_S)^-1), from the definition."""
    return np.trace(np.linalg.solve(raw(G, rows), raw(G, slice(None)) / len(G)))


def without(rows, row):
    return [other for other in rows if other != row]


# Scores and gains


def weighed(G, chosen):
    """A design of these rows, and the urn of the others with its scores."""
    G = blocks(G)
    urn = Urn(Strata.whole(len(G), len(G)), np.random.default_rng(0))
    urn.take(np.array(chosen))
    design = Design(G, second_moment(G), np.eye(G.shape[2]), chosen)
    design.weigh(urn)
    return design, urn


@pytest.mark.parametrize("k", [None, 3])
def test_scores_are_the_falls_of_the_trace(k):
    G = pool(40, 6, k)
    design, urn = weighed(G, list(range(10)))

    def check():
        now = trace(G, design.chosen)
        np.testing.assert_allclose(design.size, now)
        falls = [now - trace(G, [*design.chosen, row]) for row in range(40)]
        expected = np.where(np.isin(range(40), design.chosen), 0.0, falls)
        np.testing.assert_allclose(urn.scores, expected, rtol=1e-9)
        np.testing.assert_allclose(urn.totals.sum(), expected.sum())

    check()
    for rows in ([20], [11, 39, 12]):
        before = [trace(G, [*design.chosen, *rows[:i]]) for i in range(len(rows) + 1)]
        urn.take(np.array(rows))
        np.testing.assert_allclose(design.add(rows), -np.diff(before))
        check()
    urn.put_back(5)
    design.drop(5)
    assert 5 not in design.chosen
    check()


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("sampler", ["linear", "softmax", "greedy"])
@pytest.mark.parametrize("block", [1, 4])
def test_gains_add_up_to_what_was_gained(k, sampler, block):
    G = pool(80, 7, k)
    found = select_sequential(G, 30, sampler=sampler, block=block)
    rows, d = found.indices, found.widening.sum()
    assert found.widening[:d].all() and d == (7 if k is None else 3)
    energy = raw(G, slice(None))
    for i in range(d):
        spans = [np.linalg.svd(raw(G, rows[:c]))[0][:, : c * (k or 1)] for c in (i, i + 1)]
        shares = [np.trace(Q.T @ energy @ Q) / np.trace(energy) for Q in spans]
        np.testing.assert_allclose(found.gains[i], shares[1] - shares[0])
    traces = np.array([trace(G, rows[:c]) for c in range(d, 31)])
    np.testing.assert_allclose(found.gains[d:], -np.diff(traces) / traces[0], rtol=1e-9)
    np.testing.assert_allclose(found.gains[d:].sum(), 1 - traces[-1] / traces[0])
    np.testing.assert_allclose(found.trace, 30 * traces[-1])
    assert (found.gains > 0).all() and found.missed == pytest.approx(0, abs=1e-12)
    assert found.exchanges == 0 and np.isnan(found.start_trace)


def test_greedy_takes_the_best():
    G = pool(50, 5)
    found = select_sequential(G, 15, sampler="greedy")
    left = G.copy()
    for row in found.indices[:5]:
        assert row == np.argmax((left**2).sum(1))
        left -= np.outer(left @ left[row], left[row]) / (left[row] @ left[row])
    for i in range(5, 15):
        chosen = found.indices[:i].tolist()
        others = np.setdiff1d(np.arange(50), chosen)
        assert found.indices[i] == others[np.argmin([trace(G, [*chosen, o]) for o in others])]


@pytest.mark.parametrize("given", [{"sampler": "linear"}, {"sampler": "softmax"}])
def test_draws_are_by_the_scores(given):
    G, begun, temperature = pool(30, 4, decay=0.3), list(range(6)), 0.02
    falls = np.array([trace(G, begun) - trace(G, [*begun, row]) for row in range(6, 30)])
    shares = falls / falls.sum()
    if given["sampler"] == "softmax":
        given["temperature"] = temperature
        shares = np.exp(shares / temperature) / np.exp(shares / temperature).sum()
    draws = 2000
    last = [
        select_sequential(G, 7, required=begun, seed=seed, **given).indices[-1]
        for seed in range(draws)
    ]
    counts = np.bincount(last, minlength=30)[6:]
    sd = np.sqrt(draws * shares * (1 - shares))
    assert (np.abs(counts - draws * shares) <= SIGMAS * sd + 1).all()


def test_pivots_are_drawn_by_what_is_left_of_them():
    G, draws = pool(20, 4, decay=0.3), 2000
    G[0] *= 10
    G[1] = -G[0]  # of which nothing is left
    pairs = [select_sequential(G, 2, seed=seed).indices for seed in range(draws)]
    shares = (G**2).sum(1) / (G**2).sum()
    counts = np.bincount([first for first, _ in pairs], minlength=20)
    assert (np.abs(counts - draws * shares) <= SIGMAS * np.sqrt(draws * shares)).all()
    after = np.array([second for first, second in pairs if first in (0, 1)])
    assert len(after) > 500 and not np.isin(after, [0, 1]).any()
    left = ((G - np.outer(G @ G[0], G[0]) / (G[0] @ G[0])) ** 2).sum(1)
    expected = len(after) * left / left.sum()
    assert (np.abs(np.bincount(after, minlength=20) - expected) <= SIGMAS * expected**0.5).all()


def test_updates_do_not_drift():
    """Scores that have fallen by ten orders of magnitude, against scores computed afresh."""
    G = pool(3000, 20, decay=3)
    rng = np.random.default_rng(0)
    G[:40] *= 1e-3  # a start that covers everything badly
    design, urn = weighed(G, list(range(40)))
    first = design.size
    for row in 40 + rng.permutation(2960)[:600]:
        urn.take(np.array([row]))
        design.add([int(row)])
    assert design.size < 1e-6 * first
    fresh, other = weighed(G, design.chosen)
    np.testing.assert_allclose(design.size, fresh.size, rtol=1e-8)
    np.testing.assert_allclose(urn.scores, other.scores, rtol=1e-6)


# What must not matter


@settings(deadline=None, max_examples=100)
@given(
    N=st.integers(2, 60),
    m=st.integers(1, 8),
    k=st.sampled_from([None, 2, 3]),
    share=st.floats(0, 1),
    parts=st.integers(1, 4),
    sampler=st.sampled_from(["linear", "softmax", "greedy"]),
    seed=st.integers(0, 10**6),
)
def test_every_pool_and_quota(N, m, k, share, parts, sampler, seed):
    rng = np.random.default_rng(seed)
    G = pool(N, m, k, seed=seed)
    of = rng.integers(0, parts, N)
    counts = rng.integers(0, np.bincount(of, minlength=parts) + 1)
    counts[of[0]] = max(1, counts[of[0]])
    strata = Strata(of, counts)
    for asked in (dict(n=max(1, round(share * N))), dict(n=strata.n, strata=strata)):
        found = select_sequential(G, sampler=sampler, seed=seed, **asked)
        rows = found.indices
        assert len(np.unique(rows)) == len(rows) == asked["n"] and rows.dtype == np.int64
        again = select_sequential(G, sampler=sampler, seed=seed, **asked)
        assert np.array_equal(rows, again.indices)
        if "strata" in asked:
            assert np.array_equal(np.bincount(of[rows], minlength=parts), counts)
        known = moment_diagnostics(G, rows)
        np.testing.assert_allclose(found.trace, known["trace_score"], rtol=1e-6)
        np.testing.assert_allclose(found.missed, known["missed"], atol=1e-9)


@pytest.mark.parametrize("given", [{}, {"block": 3}, {"sampler": "greedy"}])
def test_a_smaller_n_is_a_prefix(given):
    G = pool(200, 10)
    whole = select_sequential(G, 200, seed=3, **given)
    for n in (1, 9, 10, 11, 40, 199):
        part = select_sequential(G, n, seed=3, **given)
        assert np.array_equal(part.indices, whole.indices[:n])
        np.testing.assert_allclose(part.gains, whole.gains[:n])
    assert sorted(whole.indices) == list(range(200))
    np.testing.assert_allclose(whole.trace, 10)  # of all examples it is the number of directions


@pytest.mark.parametrize("k", [None, 3])
def test_rotation_scale_and_directions_without_energy(k):
    G = pool(150, 9, k)
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((9, 9)))[0]
    one = select_sequential(G, 40, seed=2)
    wide = np.concatenate([G, 0 * G, G @ turn], axis=-1)
    for other in (G @ turn, 1e-4 * G, 3e5 * G, wide):
        found = select_sequential(other, 40, seed=2)
        assert np.array_equal(found.indices, one.indices)
        np.testing.assert_allclose(found.gains, one.gains, rtol=1e-6)
        np.testing.assert_allclose(found.trace, one.trace, rtol=1e-9)


def test_the_order_of_rows_does_not_matter_to_greedy():
    G = pool(150, 9)
    order = np.random.default_rng(0).permutation(150)
    one = select_sequential(G, 40, sampler="greedy").indices
    assert np.array_equal(order[select_sequential(G[order], 40, sampler="greedy").indices], one)


@pytest.mark.parametrize("k", [None, 2])
def test_dtype_place_and_threads_do_not_matter(k, tmp_path):
    G = pool(9000, 64, k).astype(np.float16)
    one = select_sequential(G.astype(np.float64), 90)
    np.save(tmp_path / "rows.npy", G.astype(np.float32))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    for other in (G, torch.tensor(G), torch.tensor(G).double(), mapped):
        assert np.array_equal(select_sequential(other, 90).indices, one.indices)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found = select_sequential(mapped, 90)
            assert np.array_equal(found.indices, one.indices)
    finally:
        torch.set_num_threads(threads)


# Difficult pools


def test_directions_of_very_different_energy():
    """Of 24 directions over twelve orders of magnitude of energy each is covered and weighed."""
    G = pool(400, 24, decay=5.5)
    found = select_sequential(G, 100, seed=1)
    assert found.widening.sum() == 24
    R = np.linalg.qr(G)[0] * np.sqrt(400)  # in these coordinates the inverse is well conditioned
    np.testing.assert_allclose(found.trace, 100 * trace(R, found.indices), rtol=1e-3)
    uniform = [np.random.default_rng(s).choice(400, 100, replace=False) for s in range(9)]
    assert found.trace < 100 * min(trace(R, rows) for rows in uniform)


def test_fewer_than_the_directions():
    G = pool(100, 20)
    found = select_sequential(G, 8, seed=1)
    assert found.widening.all() and found.missed > 0
    np.testing.assert_allclose(found.gains.sum(), 1 - found.missed)


def test_equal_rows_and_rows_of_zeros():
    for G in (np.ones((12, 3)), np.repeat(pool(4, 3), 3, axis=0)):
        found = select_sequential(G, 9)
        assert len(set(found.indices)) == 9 and np.isfinite(found.trace)
    G = pool(12, 3)
    G[4:] = 0
    found = select_sequential(G, 9)
    assert set(range(4)) <= set(found.indices) and len(set(found.indices)) == 9
    assert (found.gains[4:] == 0).all()


def test_dependent_rows_of_an_example():
    """Gradients of the outputs of a softmax add up to zero, so k rows span k - 1 directions."""
    G = pool(60, 8, 3)
    G -= G.mean(1, keepdims=True)
    found = select_sequential(G, 20)
    assert found.widening.sum() == 4 and found.missed == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(found.trace, 20 * trace(G, found.indices))


def test_a_quota_that_keeps_a_direction_out():
    G = pool(30, 4)
    G[:, 3] = np.where(np.arange(30) < 5, G[:, 3], 0)
    strata = Strata((np.arange(30) < 5).astype(np.int64), np.array([10, 0]))
    found = select_sequential(G, 10, strata=strata)
    share = (G[:, 3] ** 2).sum() / (G**2).sum()
    assert found.widening.sum() == 3 and found.indices.min() >= 5
    np.testing.assert_allclose(found.missed, share)
    np.testing.assert_allclose(found.trace, moment_diagnostics(G, found.indices)["trace_score"])


def test_where_only_rows_of_zeros_may_come():
    G = pool(20, 4)
    G[:8] = 0
    quota = Strata((np.arange(20) < 8).astype(np.int64), np.array([0, 5]))
    for limits in ({"strata": quota}, {"required": range(5)}, {"start": range(5), "worth": 1e9}):
        found = select_sequential(G, 5, **limits)
        assert len(set(found.indices)) == 5 and np.isfinite(found.trace)
        assert (found.missed == pytest.approx(1)) == ("start" not in limits), "a start makes room"
    assert np.array_equal(
        select_sequential(G, 5, start=[]).indices, select_sequential(G, 5).indices
    )


# A start


@pytest.fixture(scope="module")
def arrival():
    """A pool, a selection of 200 of it, and the pool after 5 % more rows with a shifted mean."""
    G = pool(2100, 24)
    G[2000:] += 0.3 * np.random.default_rng(1).standard_normal(24)
    return G, select_sequential(G[:2000], 200, seed=0).indices


def test_a_start_changes_little_and_gains_much(arrival):
    G, before = arrival
    warm = select_sequential(G, 200, start=before)
    cold = select_sequential(G, 200)
    assert warm.exchanges == len(np.setdiff1d(warm.indices, before)) > 0
    assert warm.exchanges < 0.25 * len(np.setdiff1d(cold.indices, before))
    assert warm.trace <= 1.01 * cold.trace and warm.trace < warm.start_trace
    np.testing.assert_allclose(warm.start_trace, 200 * trace(G, before))
    np.testing.assert_allclose(warm.trace, 200 * trace(G, warm.indices))
    kept = np.isin(warm.indices, before)
    assert np.isnan(warm.gains[kept]).all() and (warm.gains[~kept] > 0).all()
    assert warm.indices[kept].tolist() == [row for row in before if row in warm.indices]


def test_no_exchange_of_the_best_newcomer_is_left(arrival):
    G, before = arrival
    warm = select_sequential(G, 200, start=before, worth=1.5)
    rows = warm.indices.tolist()
    others = np.setdiff1d(np.arange(len(G)), rows)
    inverse = np.linalg.inv(raw(G, rows))
    moved = G[others] @ inverse
    falls = np.einsum("ij,jk,ik->i", moved, raw(G, slice(None)), moved)
    best = others[np.argmax(falls / (1 + (moved * G[others]).sum(1)))]
    after = min(trace(G, [*without(rows, row), best]) for row in rows)
    assert after > (1 - 1.5 / 200) * trace(G, rows)
    assert select_sequential(G, 200, start=rows, worth=1.5).exchanges == 0
    assert select_sequential(G, 200, start=before, worth=1e9).indices.tolist() == before.tolist()


def test_what_is_required_stays(arrival):
    G, before = arrival
    required = before[::4]
    free = select_sequential(G, 200, start=before, worth=0.3)
    assert not np.isin(required, free.indices).all(), "left alone, some of them would go"
    bound = select_sequential(G, 200, start=before, worth=0.3, required=required)
    assert bound.indices[:50].tolist() == required.tolist()
    assert free.trace <= bound.trace < bound.start_trace


@pytest.mark.parametrize("n", [150, 260])
def test_a_start_of_another_size_grows_or_shrinks_first(arrival, n):
    G, before = arrival
    found = select_sequential(G, n, start=before, worth=1e9)
    shared = np.intersect1d(found.indices, before)
    assert len(set(found.indices)) == n and len(shared) == min(n, 200)
    assert found.exchanges == 0 and found.start_trace == pytest.approx(found.trace)
    if n == 150:
        drawn = np.random.default_rng(0)
        random = [drawn.permutation(before)[:n] for _ in range(20)]
        assert found.trace < n * min(trace(G, rows) for rows in random)
        rows = before.tolist()
        while len(rows) > 190:
            rows = min((without(rows, row) for row in rows), key=lambda left: trace(G, left))
        ten_less = select_sequential(G, 190, start=before, worth=1e9)
        assert ten_less.indices.tolist() == rows


@pytest.mark.parametrize("k", [None, 2])
def test_a_new_direction_is_taken_in(k):
    G = pool(330, 9, k)
    G[:300, ..., 8] = 0
    before = select_sequential(G[:300], 60).indices
    warm = select_sequential(G, 60, start=before)
    assert warm.missed == pytest.approx(0, abs=1e-12) and warm.widening.sum() == 1
    assert len(np.intersect1d(warm.indices, before)) >= 40
    np.testing.assert_allclose(warm.trace, 60 * trace(G, warm.indices))


@pytest.mark.parametrize("k", [None, 2])
def test_a_start_under_quotas(k):
    G = pool(300, 6, k)
    of = np.repeat([0, 1, 2], 100)
    before = np.concatenate([np.arange(30), 100 + np.arange(10)])
    strata = Strata(of, np.array([20, 20, 5]))
    warm = select_sequential(G, 45, start=before, strata=strata, worth=0.5)
    assert np.bincount(of[warm.indices]).tolist() == [20, 20, 5] and warm.exchanges > 0
    assert warm.trace < warm.start_trace
    np.testing.assert_allclose(warm.trace, 45 * trace(G, warm.indices))


def test_a_start_with_fewer_rows_than_directions_is_kept():
    G = pool(100, 20)
    before = select_sequential(G, 12).indices
    assert select_sequential(G, 12, start=before).indices.tolist() == before.tolist()
    assert select_sequential(G, 8, start=before).indices.tolist() == before[:8].tolist()
    longer = select_sequential(G, 15, start=before)
    assert longer.indices[:12].tolist() == before.tolist() and longer.widening[12:].all()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"n": 0}, "n = 0"),
        ({"n": 31}, "n = 31: a subset of 30"),
        ({"block": 0}, "block = 0"),
        ({"sampler": "best"}, "unknown sampler 'best'"),
        ({"temperature": 0.0}, "temperature = 0"),
        ({"strata": Strata.whole(30, 6)}, "strata of 6 of 30"),
        ({"required": [1, 1]}, "required has indices that repeat"),
        ({"required": range(6)}, "6 examples are required"),
        ({"required": [0.5]}, "required must be integer"),
        ({"start": [30]}, r"start must lie in \[0, 30\)"),
        ({"sketches": np.zeros((30, 2))}, "all zero"),
        ({"sketches": np.full((30, 2), np.nan)}, "not finite"),
    ],
)
def test_refusals(given, message):
    with pytest.raises(ValueError, match=message):
        select_sequential(**{"sketches": pool(30, 4), "n": 5} | given)


# The clusters of section 4.1 of the paper


def test_small_clusters_are_not_missed():
    N, r, K = 2000, 2400, 8
    rng = np.random.default_rng(0)
    sizes = np.diff([0, *np.sort(rng.integers(1, N - 1, K - 1)), N])
    norms, stds = rng.integers(1, K + 1, K) * K, rng.random(K) * 0.04
    rng.standard_normal(K)
    cluster = np.repeat(np.arange(K), sizes)
    assert sizes.tolist() == [82, 69, 389, 76, 406, 251, 427, 300]
    X = stds[cluster, None] * rng.standard_normal((N, r))
    X[np.arange(N), cluster] += norms[cluster]
    G = X @ np.random.default_rng(0).standard_normal((r, 28)) / np.sqrt(28)
    missed = [
        len(np.unique(cluster[select_sequential(G, 48, seed=seed).indices])) < K
        for seed in range(50)
    ]
    assert sum(missed) <= 2, "a uniform draw misses one of them 20 times in 50"
