"""Properties of second moments: their dimension, reduction, and what a subset keeps of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsel_assets.selection import arrays
from dsel_assets.selection.coverage import clusters, covered
from dsel_assets.selection.moments import (
    intrinsic_dimension,
    moment_diagnostics,
    reduce_sketches,
    second_moment,
)


def pool(N, m, *, seed=0, decay=1.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((N, m)) * np.logspace(0, -decay, m)


def test_the_moment_is_the_definition_whatever_the_chunk(monkeypatch):
    G = pool(50, 6)
    blocks = G.reshape(10, 5, 6)
    for chunk in (1, 7, 10**6):
        monkeypatch.setattr(arrays, "CHUNK", chunk)
        np.testing.assert_allclose(second_moment(G), G.T @ G / 50, rtol=1e-12)
        np.testing.assert_allclose(second_moment(blocks), G.T @ G / 10, rtol=1e-12)
    single = torch.tensor(G, dtype=torch.float32)
    np.testing.assert_allclose(second_moment(single), G.T @ G / 50, rtol=1e-6, atol=1e-7)


def test_intrinsic_dimension_is_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(50):
        eigenvalues, size = np.sort(rng.pareto(1, 20))[::-1], rng.integers(1, 500)
        tails = [eigenvalues[t:].sum() for t in range(21)]
        expected = next(t for t in range(21) if tails[t] <= tails[0] / size)
        assert intrinsic_dimension(rng.permutation(eigenvalues), size) == expected
    assert intrinsic_dimension([1.0] * 8 + [-1e-18] * 90, 1000) == 8


def test_reduction():
    low_rank = pool(500, 3, decay=0) @ np.random.default_rng(1).standard_normal((3, 100))
    reduced = reduce_sketches(low_rank, 60)
    assert reduced.shape == (500, 12), "four times the intrinsic dimension"
    assert reduce_sketches(low_rank, 15).shape == (500, 10), "and below n / 1.5"
    assert reduce_sketches(low_rank, 1).shape == (500, 1)
    assert np.array_equal(reduce_sketches(low_rank[:, :5], 60), low_rank[:, :5])
    np.testing.assert_allclose(reduce_sketches(2 * low_rank, 60), 2 * reduced)
    wide = pool(300, 1000, decay=0)
    lengths = (reduce_sketches(wide, 250) ** 2).sum(1) / (wide**2).sum(1)
    m = int(250 / 1.5)
    assert lengths.mean() == pytest.approx(1, abs=6 * np.sqrt(2 / m / 300))
    assert lengths.var() == pytest.approx(2 / m, rel=0.5)


@settings(deadline=None, max_examples=30)
@given(N=st.integers(20, 100), m=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_scores_of_a_subset(N, m, seed):
    G = pool(N, m, seed=seed)
    chosen = np.random.default_rng(seed).choice(N, 15, replace=False)
    scores = moment_diagnostics(G, chosen)
    whole, part = G.T @ G / N, G[chosen].T @ G[chosen] / 15
    np.testing.assert_allclose(
        scores["c_s"], np.linalg.eigvals(np.linalg.solve(part, whole)).real.max(), rtol=1e-6
    )
    np.testing.assert_allclose(
        scores["trace_score"], np.trace(np.linalg.solve(part, whole)), rtol=1e-6
    )
    assert scores["c_s"] >= scores["least_c_s"] * (1 - 1e-9)
    assert scores["c_s"] >= 15 / N and scores["least_c_s"] >= 15 / N
    assert scores["c_s"] <= scores["trace_score"] * (1 + 1e-9) <= scores["c_s"] * m * (1 + 2e-9)
    inverse = np.trace(np.linalg.solve(whole, part))
    assert scores["trace_score"] >= m**2 / inverse * (1 - 1e-9)
    assert scores["rank"] == scores["pool_rank"] == m and abs(scores["missed"]) < 1e-9


def test_uniform_subsets_have_a_trace_score_of_at_least_m_on_average():
    G = pool(200, 6)
    rng = np.random.default_rng(0)
    draws = [moment_diagnostics(G, rng.choice(200, 30, replace=False)) for _ in range(200)]
    assert np.mean([draw["trace_score"] for draw in draws]) >= 6


def test_a_missing_direction_is_not_hidden():
    G = np.concatenate([np.eye(3), np.eye(3), 2 * np.eye(3)[:1]])
    scores = moment_diagnostics(G, [0, 1])
    assert scores["c_s"] == np.inf and scores["rank"] == 2 and scores["pool_rank"] == 3
    assert np.isfinite([scores["eigen_score"], scores["trace_score"]]).all()
    np.testing.assert_allclose(scores["missed"], 2 / 10)
    assert moment_diagnostics(np.vstack([G, np.zeros(3)]), [7])["c_s"] == np.inf


def test_blocks_count_as_one_example():
    """Several rows an example: its moment is their sum, and n counts examples."""
    blocks = pool(120, 6).reshape(40, 3, 6)
    chosen = np.arange(0, 40, 3)
    scores = moment_diagnostics(blocks, chosen)
    whole = np.einsum("nki,nkj->ij", blocks, blocks) / 40
    part = np.einsum("nki,nkj->ij", blocks[chosen], blocks[chosen]) / len(chosen)
    assert scores["n"] == len(chosen)
    np.testing.assert_allclose(scores["trace_score"], np.trace(np.linalg.solve(part, whole)))
    reduced = reduce_sketches(blocks, 40, 4)
    assert reduced.shape == (40, 3, 4)
    np.testing.assert_allclose(reduced[:, 1], reduce_sketches(blocks[:, 1], 40, 4))


def test_the_terms_of_the_bound():
    G = pool(200, 5, decay=0.3)
    chosen = np.arange(30)
    scores = moment_diagnostics(G, chosen)
    spectrum = np.linalg.eigvalsh(G[chosen].T @ G[chosen] / 30)[::-1]
    trace = (G**2).sum() / 200
    r = intrinsic_dimension(np.linalg.eigvalsh(G.T @ G / 200), 200)
    gamma = spectrum[int(np.ceil(1.1 * r)) - 1] if np.ceil(1.1 * r) <= 5 else 0
    assert scores["bound_variance"] == pytest.approx(scores["trace_score"] / 30)
    assert scores["bound_bias"] == pytest.approx(scores["c_s"] * trace / 30)
    expected = scores["c_s"] * trace / (30 * 5 * gamma) if gamma else np.inf
    assert scores["bound_sketch"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda G: reduce_sketches(G, 0), "n = 0"),
        (lambda G: reduce_sketches(G, 5, 0), "dimension = 0"),
        (lambda G: moment_diagnostics(G, []), "no indices"),
        (lambda G: moment_diagnostics(0 * G, [1]), "all zero"),
        (lambda G: second_moment(G[0]), "must be"),
        (lambda G: second_moment(np.where(np.arange(30)[:, None] == 7, np.inf, G)), "finite: 7"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(pool(30, 4))


def test_clusters_and_what_is_reached():
    centres = 10 * np.eye(5)
    of = np.repeat(np.arange(5), 30)
    rows = centres[of] + 0.1 * np.random.default_rng(0).standard_normal((150, 5))
    found = clusters(rows, 5)
    assert len(np.unique(found)) == 5
    assert all(len(np.unique(found[of == part])) == 1 for part in range(5))
    assert covered(found, np.arange(60)) == 0.4 and covered(found, np.arange(150)) == 1
    assert covered(["a", "b", "b"], [1, 2]) == 0.5
    assert len(np.unique(clusters(rows[:3], 9))) == 3
