"""Lanczos, trace and advice on operators whose spectrum is known."""

import numpy as np
import pytest
import torch

from dsel_assets.curvature import (
    density,
    negative_ratio,
    outliers,
    predicted_error,
    spectrum,
    suggest_dimension,
)
from dsel_assets.sketching import make_sketch

DIM = 600
TOP = np.linspace(100, 13, 10)
NEGATIVE = np.array([-8.0, -12.0, -30.0])
VALUES = np.concatenate([TOP, NEGATIVE, np.linspace(0, 0.4, DIM - 13)])


def operator(values, seed=0):
    """The product with a symmetric matrix of these eigenvalues in a random orthogonal basis."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    H = Q @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ Q.T
    return lambda v: H @ v


def test_known_spectrum():
    found = spectrum(operator(VALUES), DIM, k=13)
    np.testing.assert_allclose(found.eigenvalues, [*TOP, *NEGATIVE], atol=1e-6)
    assert found.residuals.max() < 1e-6
    assert (found.eigenvalues == found.raw).all()


def test_both_ends_are_kept():
    both = spectrum(operator(VALUES), DIM, k=3).eigenvalues
    np.testing.assert_allclose(both, [100, TOP[1], -30], atol=1e-6)
    both = spectrum(operator(-VALUES), DIM, k=3).eigenvalues
    np.testing.assert_allclose(both, [30, -TOP[1], -100], atol=1e-6)
    assert spectrum(operator(-VALUES), DIM, k=1).eigenvalues == pytest.approx([-100])


def test_residuals_bound_the_error():
    found = spectrum(operator(VALUES), DIM, k=5, iterations=14)
    error = np.abs(found.raw[:, None] - VALUES).min(axis=1)
    assert (error <= found.residuals + 1e-9).all()
    assert found.residuals.max() > 1e-3


def test_lanczos_vectors_stay_orthogonal():
    calls = []
    product = operator(VALUES)

    def recorded(v):
        calls.append(v.clone())
        return product(v)

    spectrum(recorded, DIM, k=10, iterations=200, probes=1)
    Q = torch.stack(calls[:200])
    assert (Q @ Q.T - torch.eye(200)).abs().max() < 1e-12

    calls.clear()
    spectrum(lambda v: recorded(v).float(), DIM, k=10, iterations=200, probes=1)
    Q = torch.stack(calls[:200])
    assert (Q @ Q.T - torch.eye(200)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "values",
    [
        [0.0] * 20,
        [3.0] * 20,
        [5.0, 5.0, 5.0, -2.0] + [1.0] * 16,
        [7.0] + [0.0] * 19,
        [4.0],
        list(np.linspace(-1, 2, 20)),
    ],
)
def test_invariant_subspaces_and_whole_spaces(values):
    n = len(values)
    found = spectrum(operator(values), n, k=n, iterations=n)
    np.testing.assert_allclose(found.eigenvalues, sorted(values, reverse=True), atol=1e-10)
    assert found.weights.sum() == pytest.approx(1)


def test_trace_and_frobenius_norm():
    estimates = [spectrum(operator(VALUES), DIM, k=1, iterations=1, seed=s) for s in range(60)]
    for exact, drawn in [
        (VALUES.sum(), [e.trace for e in estimates]),
        ((VALUES**2).sum(), [e.frobenius**2 for e in estimates]),
    ]:
        assert abs(np.mean(drawn) - exact) < 4 * np.std(drawn) / len(drawn) ** 0.5
    # Var z'Hz = 2 (|H|_F^2 - sum of squares of the diagonal), over 8 probes
    assert np.std([e.trace for e in estimates]) < 1.5 * (2 * (VALUES**2).sum() / 8) ** 0.5
    diagonal = spectrum(lambda v: torch.as_tensor(VALUES) * v, DIM, k=1, iterations=1, probes=1)
    assert diagonal.trace == pytest.approx(VALUES.sum())
    assert diagonal.frobenius == pytest.approx((VALUES**2).sum() ** 0.5)


def test_seed_decides():
    first, again, other = (spectrum(operator(VALUES), DIM, k=2, seed=s) for s in (1, 1, 2))
    assert first.trace == again.trace and (first.nodes == again.nodes).all()
    assert first.trace != other.trace


def test_refusals():
    for bad in ({"k": 0}, {"k": 11}, {"k": 2, "iterations": 1}, {"k": 1, "iterations": 11}):
        with pytest.raises(ValueError, match="dim=10"):
            spectrum(lambda v: v, 10, **bad)
    with pytest.raises(ValueError, match="not finite"):
        spectrum(lambda v: v * float("nan"), 10, k=1)


def test_density():
    values = np.concatenate([np.linspace(-1, 1, 500), [6.0] * 100])
    found = spectrum(operator(values), 600, k=1, iterations=60)
    grid = np.linspace(-4, 10, 2001)
    curve = density(found, grid, 0.2)
    step = grid[1] - grid[0]
    assert curve.sum() * step == pytest.approx(1, abs=1e-6)
    assert curve[grid > 4].sum() * step == pytest.approx(1 / 6, abs=0.06)
    assert (
        curve[(grid > -0.7) & (grid < 0.7)].std() / curve[(grid > -0.7) & (grid < 0.7)].mean() < 0.3
    )
    with pytest.raises(ValueError, match="width"):
        density(found, grid, 0.0)


def test_negative_ratio_and_outliers():
    assert negative_ratio([10.0, 1.0, -3.0, -5.0]) == 0.5
    assert negative_ratio([10.0, 1.0]) == 0
    assert negative_ratio([-1.0]) == float("inf")
    assert outliers([10.0, 3.0, 2.0, 1.9, -50.0]) == 2
    assert outliers([10.0, 3.0, 2.0, 1.9, -50.0], share=0.1) == 4
    assert outliers([-1.0, -2.0]) == 0
    assert outliers([0.0]) == 0


def test_suggested_dimension():
    found = spectrum(operator(VALUES), DIM, k=13)
    kept = TOP[TOP > 20]
    by_hand = (abs(found.trace - kept.sum()) / 64 + found.frobenius / 8) / kept[-1]
    assert predicted_error(found, 64) == pytest.approx(by_hand)
    curve = predicted_error(found, [2, 64, 4096])
    assert curve.shape == (3,) and (np.diff(curve) < 0).all()
    for tolerance in (3.0, 1.0, 0.5):
        D = suggest_dimension(found, tolerance)
        assert predicted_error(found, D) <= tolerance < predicted_error(found, D // 2)
    assert suggest_dimension(found, 1e9) == 1
    assert suggest_dimension(found, 1e-9) == 1024  # of 600
    with pytest.raises(ValueError, match="tolerance"):
        suggest_dimension(found, 0)
    with pytest.raises(ValueError, match="positive"):
        suggest_dimension(spectrum(lambda v: -v, 10, k=2), 0.1)


@pytest.mark.parametrize("kind", ["affd", "countsketch"])
def test_bias_of_a_sketched_spectrum(kind):
    """The note's PSD bulk, smaller: raw eigenvalues are too large by tr(bulk)/D."""
    p, D = 2**15, 2**9
    values = torch.rand(p, generator=torch.Generator().manual_seed(0)).double() * 0.4
    values[:10], values[10:13] = torch.as_tensor(TOP), torch.as_tensor(NEGATIVE)
    S = make_sketch(kind, p, D)
    found = spectrum(
        lambda v: S(values * S.adjoint(v)), D, k=14, iterations=80, probes=32, sketched=True
    )
    bulk = values[13:].sum().item() / D
    np.testing.assert_allclose(found.raw - found.eigenvalues, bulk, rtol=0.1)
    noise = values.norm().item() / D**0.5
    assert np.abs(found.eigenvalues[:10] - TOP).max() < 3 * noise
    assert np.abs(found.raw[:10] - TOP).mean() > 2 * np.abs(found.eigenvalues[:10] - TOP).mean()
    assert abs(found.frobenius / values.norm().item() - 1) < 0.35
