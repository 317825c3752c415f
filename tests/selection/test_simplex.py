"""The nearest capped weights: exact, idempotent, part by part."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize

from dsel_assets.selection.simplex import CappedSimplices, project_capped_simplex
from dsel_assets.selection.strata import Strata

finite = st.floats(-1e3, 1e3, allow_subnormal=False)


@settings(deadline=None, max_examples=200)
@given(v=arrays(float, st.integers(1, 40), elements=finite), share=st.floats(0, 1))
def test_projection_is_the_nearest_point(v, share):
    cap = 1 / len(v) + share * (1 - 1 / len(v))
    s = project_capped_simplex(v, cap)
    assert s.min() >= 0 and s.max() <= cap * (1 + 1e-15)
    np.testing.assert_allclose(s.sum(), 1, atol=1e-12)
    np.testing.assert_allclose(project_capped_simplex(s, cap), s, atol=1e-12)
    # The nearest point's residual supports the set: the best vertex is no better than s.
    residual = np.sort(v - s)[::-1]
    whole = int(1 / cap)
    best = cap * residual[:whole].sum() + (1 - whole * cap) * (
        residual[whole] if whole < len(v) else 0
    )
    assert (v - s) @ s >= best - 1e-9


def test_clamping_and_rescaling_is_not_the_projection():
    v, cap = np.array([0.9, 0.3, -0.2, 0.1]), 0.5
    rescaled = np.clip(v, 0, cap) / np.clip(v, 0, cap).sum()
    assert rescaled.max() > cap
    np.testing.assert_allclose(project_capped_simplex(v, cap), [0.5, 0.35, 0, 0.15])
    np.testing.assert_allclose(project_capped_simplex(v, 5.0), [0.8, 0.2, 0, 0], atol=1e-15)


def test_projection_of_a_long_vector_is_exact():
    v = np.random.default_rng(0).standard_normal(100_000) * 1e3
    s = project_capped_simplex(v, 1 / 5000)
    assert abs(s.sum() - 1) < 1e-13 and s.max() <= 1 / 5000
    with pytest.raises(ValueError, match="cannot add up to 1"):
        project_capped_simplex(v[:10], 0.05)
    with pytest.raises(ValueError, match="not finite"):
        project_capped_simplex([0.0, np.nan], 1.0)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), parts=st.integers(1, 6))
def test_parts_are_projected_each_on_its_own(seed, parts):
    rng = np.random.default_rng(seed)
    of = np.concatenate([np.arange(parts), rng.integers(0, parts, 30)])
    sizes = np.bincount(of)
    counts = rng.integers(0, sizes + 1)
    counts[0] = max(counts[0], 1)
    strata = Strata(of, counts)
    v = rng.standard_normal(len(of)) / strata.n
    s, _ = CappedSimplices.of_strata(strata).project(v)
    np.testing.assert_allclose(np.bincount(of, s), counts / strata.n, atol=1e-12)
    for part in np.flatnonzero(counts):
        alone = project_capped_simplex(v[of == part] * strata.n / counts[part], 1 / counts[part])
        np.testing.assert_allclose(s[of == part], alone * counts[part] / strata.n, atol=1e-10)


def test_agrees_with_a_general_solver():
    rng = np.random.default_rng(3)
    of, counts = np.array([0, 0, 0, 1, 1, 1, 1]), np.array([1, 2])
    v = rng.standard_normal(7) / 3
    other = minimize(
        lambda s: ((s - v) ** 2).sum(),
        np.full(7, 1 / 7),
        jac=lambda s: 2 * (s - v),
        bounds=[(0, 1 / 3)] * 7,
        constraints=[
            {"type": "eq", "fun": lambda s, k=k: s[of == k].sum() - counts[k] / 3} for k in range(2)
        ],
        method="SLSQP",
        options={"ftol": 1e-14},
    )
    s, _ = CappedSimplices.of_strata(Strata(of, counts)).project(v)
    np.testing.assert_allclose(s, other.x, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6))
def test_no_feasible_weights_exceed_the_greatest(seed):
    rng = np.random.default_rng(seed)
    of = np.concatenate([[0, 1, 2], rng.integers(0, 3, 20)])
    counts = np.minimum(np.bincount(of), rng.integers(0, 6, 3))
    counts[0] = max(1, counts[0])
    feasible = CappedSimplices.of_strata(Strata(of, counts))
    v = rng.standard_normal(23)
    s, _ = feasible.project(rng.standard_normal(23))
    assert s @ v <= feasible.greatest(v) + 1e-12
    best = sum(np.sort(v[of == k])[::-1][: counts[k]].sum() for k in range(3)) / counts.sum()
    np.testing.assert_allclose(feasible.greatest(v), best)
