"""Unbiasedness and variance of every sketch on spread and on structured inputs."""

import numpy as np
import pytest
import torch

from dsel_assets.sketching import make_sketch
from dsel_assets.sketching.hadamard import hadamard

N, D = 2**14, 2**8


def inputs(n, D):
    """Unit vectors [7, n]: the structures on which one sketch or another is known to fail."""
    generator = torch.Generator().manual_seed(0)
    side = int(n**0.5)
    x = {
        "dense": torch.randn(n, generator=generator),
        "coordinate": torch.eye(1, n)[0],
        "row": torch.zeros(n),
        "column": torch.zeros(n),
        "rank one": torch.outer(*torch.randn(2, side, generator=generator)).flatten(),
        "ffd": torch.zeros(n),
        "heavy tail": torch.randn(n, generator=generator) ** 9,
    }
    x["row"][5 * D : 5 * D + side] = torch.randn(side, generator=generator)
    x["column"][::D] = torch.randn(n // D, generator=generator)
    x["ffd"][:D] = hadamard(torch.eye(1, D)[0])  # the transform of a block is one coordinate
    return list(x), torch.stack([v.double() / v.double().norm() for v in x.values()])


def squared_norms(kind, x, D, seeds):
    return np.stack(
        [make_sketch(kind, x.shape[1], D, s)(x).square().sum(1).numpy() for s in range(seeds)]
    )


def assert_unbiased(squares):
    error = squares.std(axis=0) / len(squares) ** 0.5
    assert (np.abs(squares.mean(axis=0) - 1) < 4 * error + 1e-6).all()


@pytest.mark.parametrize(("n", "D"), [(N, D), (2**10, 2**6), (2**10, 48)])
def test_affd_is_safe_on_every_structure(n, D):
    names, x = inputs(n, 2 ** (D - 1).bit_length())
    squares = squared_norms("affd", x, D, 400)
    assert_unbiased(squares)
    scaled = dict(zip(names, D * squares.var(axis=0), strict=True))
    assert max(scaled.values()) < 8, scaled
    assert 1.6 < scaled["coordinate"] < 2.6


@pytest.mark.parametrize("ratio", [4, 8, 16])
def test_affd_variance_by_the_size_of_the_block(ratio):
    """D Var = 2 (1 + 2 D/n) on a spread input: no block is shorter than 4 D, so at most 3."""
    n = 64 * ratio
    x = torch.ones(1, n).double() / n**0.5
    squares = squared_norms("affd", x, 64, 4000)
    assert_unbiased(squares)
    assert abs(64 * squares.var() / (2 + 4 / ratio) - 1) < 0.15


def test_affd_is_unbiased_over_several_blocks():
    x = torch.randn(1, 40_000, generator=torch.Generator().manual_seed(0)).double()
    squares = squared_norms("affd", x / x.norm(), 200, 400)
    assert_unbiased(squares)
    assert 1.6 < 200 * squares.var() < 2.6


def test_gaussian_is_two_on_every_structure():
    _, x = inputs(256, 16)
    squares = squared_norms("gaussian", x, 16, 1000)
    assert_unbiased(squares)
    scaled = 16 * squares.var(axis=0)
    assert ((scaled > 1.6) & (scaled < 2.6)).all(), scaled


def test_countsketch_variance_of_norms():
    """D Var = 2 (1 - sum over runs of the squared share of the energy)."""
    names, x = inputs(N, D)
    squares = squared_norms("countsketch", x, D, 2000)
    assert_unbiased(squares)
    share = x.square().view(len(x), -1, D).sum(2)
    expected = 2 * (1 - share.square().sum(1)).numpy()
    scaled = D * squares.var(axis=0)
    for name, got, formula in zip(names, scaled, expected, strict=True):
        assert abs(got - formula) <= (0.25 if name == "heavy tail" else 0.1) * formula + 1e-9, name
    assert scaled[names.index("coordinate")] < 1e-9 and scaled[names.index("row")] < 1e-9
    assert 1.6 < scaled[names.index("dense")] < 2.6 and 1.6 < scaled[names.index("column")] < 2.6


def test_countsketch_variance_of_inner_products():
    """Var<Sx, Sy> = 1/D sum over pairs of coordinates of different runs (x_i y_j + x_j y_i)^2."""
    n, D = 1000, 64
    x, y = torch.randn(2, n, generator=torch.Generator().manual_seed(0)).double()
    y += 0.5 * x
    pairs = (torch.outer(x, y) + torch.outer(y, x)).square()
    run = torch.arange(n) // D
    expected = pairs[run[:, None] < run].sum().item() / D
    sketches = (make_sketch("countsketch", n, D, seed) for seed in range(4000))
    products = torch.stack([torch.dot(*s(torch.stack([x, y]))) for s in sketches]).numpy()
    assert abs(products.var() / expected - 1) < 0.1
    assert abs(products.mean() - (x @ y).item()) < 4 * (expected / 4000) ** 0.5


@pytest.mark.parametrize("kind", ["countsketch", "affd"])
def test_distances_of_many_points(kind):
    """Johnson-Lindenstrauss: at D = 8 ln(M) / eps^2 next to no pair is off by eps."""
    M, eps = 100, 0.3
    D = int(8 * np.log(M) / eps**2)
    x = torch.randn(M, 5000, generator=torch.Generator().manual_seed(0)).double()
    pairs = torch.pdist(make_sketch(kind, 5000, D)(x)).square() / torch.pdist(x).square()
    error = (pairs - 1).abs()
    assert (error > eps).double().mean() < 1e-3
    assert 0.8 < error.median() * D**0.5 < 1.1  # 0.67 sqrt(2)
