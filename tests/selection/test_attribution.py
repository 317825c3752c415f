"""Properties of the scores: exact small cases, a dense formula, invariances, memory."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dsel_assets.selection import attribution

HOW = ("dot", "cosine", "trak")
every = pytest.mark.parametrize("how", HOW)


def draw(N=60, m=7, D=12, *, seed=0, decay=1.0):
    """Rows whose second moment has a spectrum that falls by 10^(2 decay)."""
    rng = np.random.default_rng(seed)
    scale = np.logspace(0, -decay, D)
    return rng.standard_normal((N, D)) * scale, rng.standard_normal((m, D)) * scale


def dense(X, T, how, damping=0.1):
    """The definition, with an explicit inverse."""
    X, T = np.asarray(X, float), np.asarray(T, float)
    if how == "dot":
        return X @ T.T
    if how == "cosine":
        return X @ T.T / np.outer(np.linalg.norm(X, axis=1), np.linalg.norm(T, axis=1))
    fisher = X.T @ X / len(X)
    added = damping * np.linalg.eigvalsh(fisher).mean() * np.eye(len(fisher))
    return X @ np.linalg.inv(fisher + added) @ T.T


def test_small_cases_by_hand():
    X, T = [[3.0, 4.0], [0.0, 0.0], [-2.0, 0.0]], [[1.0, 0.0], [0.0, 10.0]]
    assert attribution(X, T, how="dot").tolist() == [[3, 40], [0, 0], [-2, 0]]
    assert attribution(X, T).tolist() == [[0.6, 0.8], [0, 0], [-1, 0]]
    # F = diag(2, 8), mean eigenvalue 5, lambda 10
    X = [[2.0, 0.0], [0.0, 4.0]]
    found = attribution(X, T, how="trak", damping=2)
    np.testing.assert_allclose(found, [[2 / 12, 0], [0, 40 / 18]], rtol=1e-15)


@every
@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    N=st.integers(1, 40),
    m=st.integers(1, 9),
    D=st.integers(1, 30),
    damping=st.sampled_from([1e-3, 0.1, 10.0]),
    block_bytes=st.sampled_from([1, 500, 1 << 20]),
)
def test_scores_are_those_of_the_definition(how, seed, N, m, D, damping, block_bytes):
    X, T = draw(N, m, D, seed=seed)
    found = attribution(X, T, how=how, damping=damping, block_bytes=block_bytes)
    assert found.shape == (N, m) and found.dtype == np.float64
    expected = dense(X, T, how, damping)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11 * np.abs(expected).max())


@every
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_narrow_rows_are_computed_in_double(how, dtype):
    X, T = ((100 * rows).astype(dtype) for rows in draw())
    expected = dense(X, T, how)
    bound = 1e-11 * np.abs(expected).max()
    np.testing.assert_allclose(attribution(X, T, how=how), expected, rtol=1e-10, atol=bound)


@every
def test_half_precision_does_not_overflow(how):
    X, T = (np.full((5, 64), 6e4, np.float16), np.full((2, 64), -6e4, np.float16))
    found = attribution(X, T, how=how)
    np.testing.assert_allclose(found, dense(X, T, how), rtol=1e-8)


@every
def test_tensors_views_and_lists_score_like_arrays(how):
    X, T = (rows.astype(np.float32) for rows in draw())
    expected = attribution(X, T, how=how)
    wide = np.zeros((2 * len(X), 2 * X.shape[1]), np.float32)[::2, ::-2]
    wide[:] = X
    tensors = torch.from_numpy(X).requires_grad_(), torch.from_numpy(T.T.copy()).T
    for pool, target in (tensors, (wide, T[::-1][::-1]), (X.tolist(), T.tolist())):
        np.testing.assert_allclose(attribution(pool, target, how=how), expected, rtol=1e-12)
    half = torch.from_numpy(X).bfloat16()
    np.testing.assert_allclose(
        attribution(half, T, how=how), attribution(half.float(), T, how=how), rtol=1e-12
    )


@every
def test_the_arrays_are_left_as_they_were(how):
    X, T = draw()
    before = X.copy(), T.copy()
    X.setflags(write=False)
    attribution(X, T, how=how)
    assert np.array_equal(X, before[0]) and np.array_equal(T, before[1])


# Invariances


@every
def test_a_row_has_its_score_wherever_it_stands(how):
    X, T = draw(300)
    rng = np.random.default_rng(1)
    rows, columns = rng.permutation(len(X)), rng.permutation(len(T))
    moved = attribution(X[rows], T[columns], how=how)
    expected = attribution(X, T, how=how)[np.ix_(rows, columns)]
    np.testing.assert_allclose(moved, expected, rtol=1e-10, atol=1e-13)


@every
def test_a_rotation_of_both_changes_nothing(how):
    X, T = draw()
    Q = np.linalg.qr(np.random.default_rng(3).standard_normal((X.shape[1],) * 2))[0]
    expected = attribution(X, T, how=how)
    np.testing.assert_allclose(attribution(X @ Q, T @ Q, how=how), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("unit", [1e-30, 1e-3, 1e30])
def test_units(unit):
    """Cosines do not see the lengths of rows, dot has their square, trak only the ratio."""
    X, T = (rows.astype(np.float32) for rows in draw())
    lengths = np.random.default_rng(2).lognormal(0, 2, (len(X), 1)).astype(np.float32)
    scaled, moved = (unit * X).astype(np.float32), (unit * lengths * X).astype(np.float32)
    cosine = attribution(X, T)
    assert np.abs(attribution(moved, T * np.float32(unit)) - cosine).max() < 1e-6
    both = [attribution(scaled, T * np.float32(unit), how=how) for how in ("dot", "trak")]
    once = [attribution(X, T, how=how) for how in ("dot", "trak")]
    np.testing.assert_allclose(both[0] / float(unit) ** 2, once[0], atol=1e-5)
    np.testing.assert_allclose(both[1], once[1], atol=1e-5 * np.abs(once[1]).max())


@every
def test_scores_of_one_with_another_are_symmetric(how):
    X, _ = draw()
    found = attribution(X, X, how=how)
    np.testing.assert_allclose(found, found.T, rtol=1e-9, atol=1e-11)
    assert (found.diagonal() > 0).all()
    assert how != "cosine" or np.allclose(found.diagonal(), 1, atol=1e-15)


def test_much_damping_gives_dot_up_to_scale():
    X, T = draw()
    damping = 1e9
    scale = damping * (X**2).sum(1).mean() / X.shape[1]
    found = scale * attribution(X, T, how="trak", damping=damping)
    np.testing.assert_allclose(found, attribution(X, T, how="dot"), rtol=1e-6, atol=1e-7)


def test_little_damping_sees_no_linear_map():
    """Of the rows' coordinates: x'(X'X/N)^-1 t is the same for XA and TA."""
    X, T = draw(200)
    A = np.random.default_rng(4).standard_normal((X.shape[1],) * 2)
    found = [attribution(X @ M, T @ M, how="trak", damping=1e-11) for M in (np.eye(len(A)), A)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    # and the scores of the pool with itself are N times its hat matrix, of trace D
    leverage = attribution(X, X, how="trak", damping=1e-11).trace() / len(X)
    assert leverage == pytest.approx(X.shape[1], rel=1e-6)


# What the scores mean


def test_dot_is_what_a_small_step_takes_off_the_loss_and_carries_the_factor_of_trak():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (9,), generator=generator)
    weight = torch.randn(3, 5, generator=generator, dtype=torch.float64)

    def losses(w):
        return F.cross_entropy(inputs @ w.T, labels, reduction="none")

    def outputs(w):  # TRAK's f = log(p / (1 - p))
        return -losses(w) - torch.log1p(-torch.exp(-losses(w)))

    rows, of_outputs = (
        torch.autograd.functional.jacobian(function, weight).flatten(1)
        for function in (losses, outputs)
    )
    scores = attribution(rows[:6], rows[6:], how="dot")

    step = 1e-6
    for i in range(6):
        after = losses(weight - step * rows[i].view_as(weight))
        fall = ((losses(weight) - after) / step)[6:]
        np.testing.assert_allclose(fall, scores[i], rtol=1e-3, atol=1e-4)

    missed = (1 - torch.exp(-losses(weight))).numpy()
    carried = attribution(of_outputs[:6], of_outputs[6:], how="dot")
    np.testing.assert_allclose(np.outer(missed[:6], missed[6:]) * carried, scores, rtol=1e-9)


# Groups


@every
@pytest.mark.parametrize("labels", ["uniform", "single", "names", "own"])
def test_groups_give_the_mean_over_their_targets(how, labels):
    X, T = draw(m=12)
    T[3] = 0
    groups = {
        "uniform": np.random.default_rng(0).integers(-2, 3, 12),
        "single": np.zeros(12),
        "names": np.array(list("bacabcabcbac")),
        "own": np.arange(12)[::-1],
    }[labels]
    every = attribution(X, T, how=how)
    expected = np.stack([every[:, groups == g].mean(1) for g in np.unique(groups)], axis=1)
    for block_bytes in (1, 1 << 20):
        found = attribution(X, T, how=how, groups=groups, block_bytes=block_bytes)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    tensor = torch.arange(12) % 2
    assert attribution(X, T, how=how, groups=tensor).shape == (len(X), 2)


# Edges


@every
@pytest.mark.parametrize("N, m, D", [(1, 1, 1), (1, 3, 5), (40, 1, 1), (3, 2, 50)])
def test_small_sizes(how, N, m, D):
    X, T = draw(N, m, D)
    np.testing.assert_allclose(attribution(X, T, how=how), dense(X, T, how), rtol=1e-9, atol=1e-12)


@every
def test_rows_of_zeros_score_zero(how):
    X, T = draw()
    X[[0, 5]], T[1] = 0, 0
    found = attribution(X, T, how=how)
    assert np.isfinite(found).all()
    assert not found[[0, 5]].any() and not found[:, 1].any()
    assert not attribution(0 * X, T, how=how).any() and not attribution(X, 0 * T, how=how).any()


@every
def test_fewer_rows_than_features(how):
    """F is singular then, and the damping carries it."""
    X, T = draw(5, 3, 80, decay=0)
    np.testing.assert_allclose(attribution(X, T, how=how), dense(X, T, how), rtol=1e-9)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"how": "best"}, "dot, cosine, trak"),
        ({"damping": 0.0}, "damping = 0.0"),
        ({"damping": -1.0}, "positive and finite"),
        ({"damping": np.nan}, "positive and finite"),
        ({"damping": np.inf}, "positive and finite"),
        ({"block_bytes": 0}, "block_bytes"),
        ({"pool": np.empty((0, 4))}, r"pool has shape \(0, 4\)"),
        ({"pool": np.ones(4)}, r"pool has shape \(4,\)"),
        ({"pool": torch.ones(2, 4, 1)}, r"pool has shape \(2, 4, 1\)"),
        ({"target": np.empty((0, 4))}, "target has shape"),
        ({"target": []}, "target has shape"),
        ({"target": np.ones((2, 3))}, "4 features but target 3"),
        ({"groups": [0]}, r"groups has shape \(1,\); it must be \[2\]"),
        ({"groups": np.zeros((2, 1))}, "groups has shape"),
        ({"how": "trak", "damping": 1e-40, "pool": np.ones((20, 4))}, "damping = 1e-40"),
    ],
)
def test_refusals(change, message):
    arguments = {"pool": np.eye(20, 4) + 1, "target": np.eye(4)[:2]} | change
    with pytest.raises(ValueError, match=message):
        attribution(**arguments)


@every
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_that_are_not_finite_are_named(how, dtype):
    X, T = (rows.astype(dtype) for rows in draw(20))
    X[[11, 17], 1] = np.nan, -np.inf
    with pytest.raises(ValueError, match="pool has rows that are not finite: 11, 17"):
        attribution(X, T, how=how)
    with pytest.raises(ValueError, match=r"pool has rows that are not finite: 11$"):
        attribution(X, T, how=how, block_bytes=5 * 8 * 12)
    with pytest.raises(ValueError, match="target has rows that are not finite: 11, 17"):
        attribution(T, X, how=how)


def test_rows_too_long_for_double_are_refused_rather_than_scored():
    X, T = draw()
    X[4] *= 1e200
    with pytest.raises(ValueError, match="not finite: 4"):
        attribution(X, T)


@every
def test_a_memory_mapped_pool_is_never_in_memory_whole(tmp_path, how):
    N, m, D = 20_000, 3, 128
    pool = np.lib.format.open_memmap(tmp_path / "pool.npy", "w+", np.float32, (N, D))
    pool[:] = np.random.default_rng(0).standard_normal((N, D))
    target = np.ones((m, D), np.float32)
    tracemalloc.start()
    attribution(pool, target, how=how, block_bytes=1 << 18)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * N * m + 3 * 8 * D**2 + 3 * (1 << 18) < pool.nbytes / 4
