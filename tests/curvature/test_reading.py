"""What is read off a spectrum: density, outliers, alignment, and the advised dimension."""

import numpy as np
import pytest
import torch

from dsel_assets.curvature import (
    alignment,
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
VALUES = np.concatenate([TOP, [-8.0, -12.0, -30.0], np.linspace(0, 0.4, DIM - 13)])


def diagonal(values):
    """The product with a diagonal matrix."""
    return lambda v: torch.as_tensor(values, dtype=torch.float64) * v


def test_density():
    values = np.concatenate([np.linspace(-1, 1, 500), [6.0] * 100])
    found = spectrum(diagonal(values), 600, k=1, iterations=60)
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
    found = spectrum(diagonal(VALUES), DIM, k=13)
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


def test_alignment():
    Q = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0]
    inside, outside = Q[:3], Q[3:]
    assert alignment(inside.sum(0), inside) == pytest.approx(1)
    assert alignment(outside.sum(0), inside) == pytest.approx(0, abs=1e-12)
    g = 3 * inside[0] + 4 * outside[0]
    assert alignment(g, inside) == pytest.approx(9 / 25)
    assert alignment(-7 * g, inside) == pytest.approx(9 / 25)
    rows = torch.stack((g, torch.zeros(20), outside[1]))
    torch.testing.assert_close(
        alignment(rows, inside), torch.tensor([9 / 25, 0, 0], dtype=torch.float64)
    )
    assert alignment(rows.reshape(3, 1, 20).half(), inside.half()).shape == (3, 1)
    assert alignment(g, inside[:0]) == 0
    assert alignment(torch.full((20,), float("nan")), inside).isnan()
    for bad in (g[1:], torch.tensor(1.0)):
        with pytest.raises(ValueError, match="do not fit"):
            alignment(bad, inside)


def test_alignment_in_the_sketch():
    """S'u spans nearly the outlier space: the sketched share is the true one, give or take."""
    p, D = 2**13, 2**10
    values = torch.rand(p, generator=torch.Generator().manual_seed(0)).double() * 0.1
    values[:5] = torch.arange(100, 50, -10)
    S = make_sketch("countsketch", p, D)
    found = spectrum(lambda v: values * v, sketch=S, k=6, iterations=40, vectors=True)
    top = found.vectors[: outliers(found.eigenvalues)]
    assert len(top) == 5
    shares = []
    for seed in range(20):
        g = torch.randn(p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        g[5:] *= (g[:5].square().sum() / g[5:].square().sum()).sqrt()
        shares.append(alignment(S(g), top).item())
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
