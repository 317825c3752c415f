"""Sketches of matrices from their factors: TensorSketch and LoGra."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from dsel_assets.sketching import tensorsketch
from dsel_assets.sketching.logra import LoGra
from dsel_assets.sketching.tensorsketch import TensorSketch

KINDS = {cls.kind: cls for cls in (TensorSketch, LoGra)}
every_kind = pytest.mark.parametrize("kind", sorted(KINDS))
# rows, columns, D: vectors, sides above and below D, several circles, odd lengths
SHAPES = [
    (1, 1, 1),
    (5, 3, 8),
    (3, 3, 7),
    (1, 130, 32),
    (130, 1, 32),
    (64, 64, 64),
    (7, 100, 12),
    (100, 7, 12),
    (70, 50, 33),
    (9, 60, 4096),
    (90, 110, 1000),
]


def randn(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make(kind, rows, columns, D, seed=3, name="fc.weight", **options):
    return KINDS[kind](rows * columns, D, seed, name, columns=columns, **options)


def close(got, expected, tolerance):
    """Equal up to a share of each row's norm."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    error = (got - expected).norm(dim=-1)
    assert (error <= tolerance * expected.norm(dim=-1)).all(), error


def transformed(rows, columns, D, T):
    """Is it by FFTs that factors of this shape are sketched?"""
    return rows * columns * (T + tensorsketch._SMALL) > tensorsketch._SMALL * D * T


# The operator


@every_kind
@pytest.mark.parametrize(("rows", "columns", "D"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_adjoint(kind, rows, columns, D, dtype, tolerance):
    sketch = make(kind, rows, columns, D)
    x, y = randn(3, rows * columns, dtype=dtype), randn(3, D, dtype=dtype, seed=1)
    left, right = (sketch(x) * y).sum(-1), (x * sketch.adjoint(y)).sum(-1)
    assert sketch(x).dtype == sketch.adjoint(y).dtype == dtype
    assert ((left - right).abs() <= tolerance * sketch(x).norm(dim=-1) * y.norm(dim=-1)).all()


@every_kind
@pytest.mark.parametrize("T", [1, 3, 300])
@pytest.mark.parametrize(("rows", "columns", "D"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_from_factors_it_is_the_sketch_of_their_product(
    kind, rows, columns, D, T, dtype, tolerance
):
    sketch = make(kind, rows, columns, D)
    x, d = randn(3, T, columns, dtype=dtype), randn(3, T, rows, dtype=dtype, seed=1)
    close(sketch.of_factors(x, d), sketch((d.mT @ x).flatten(1)), tolerance)


def test_both_ways_to_sketch_factors_are_tested():
    ways = {transformed(*shape, T) for shape in SHAPES for T in (1, 3, 300)}
    assert ways == {True, False} and transformed(70, 50, 33, 300) and transformed(64, 64, 64, 3)


@every_kind
@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize(("rows", "columns", "D"), SHAPES)
def test_from_lookups_it_is_the_sketch_of_the_rows_sums(kind, rows, columns, D, T):
    sketch = make(kind, rows, columns, D)
    d = randn(3, T, columns)
    indices = torch.randint(rows, (3, T), generator=torch.Generator().manual_seed(0))
    one_hot = torch.nn.functional.one_hot(indices, rows).double()
    close(sketch.of_lookups(indices, d), sketch((one_hot.mT @ d).flatten(1)), 1e-13)


@pytest.mark.parametrize(("rows", "columns", "D"), [(20, 12, 36), (12, 20, 36), (50, 40, 15)])
def test_tensorsketch_by_its_definition(rows, columns, D):
    """A convolution on circles of L buckets: the longer side on all, the shorter on the first."""
    sketch = make("tensorsketch", rows, columns, D)
    L = sketch.circle
    assert {36: 12, 15: 15}[D] == L
    x, d = randn(columns).numpy(), randn(rows, seed=1).numpy()
    long, short = (d, x) if rows >= columns else (x, d)
    sides = []
    for values, side in ((long, sketch.long), (short, sketch.short)):
        own = np.zeros(D)
        np.add.at(own, side.places.numpy(), values * side.signs.numpy())
        sides.append(np.fft.fft(own.reshape(-1, L)))
    assert not np.abs(sides[1][1:]).any()
    expected = np.fft.ifft(sides[0] * sides[1][0]).real.flatten()
    np.testing.assert_allclose(sketch(torch.from_numpy(np.outer(d, x).flatten())), expected)
    assert set(sketch.long.signs.tolist()) == set(sketch.short.signs.tolist()) == {-1.0, 1.0}
    assert len(set(sketch.long.places[:D].tolist())) == min(D, max(rows, columns))


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (64, 16), (64, 1), (1, 1)])
def test_tensorsketch_keeps_the_norm_of_a_row_and_of_a_column(rows, columns):
    sketch, side = make("tensorsketch", rows, columns, 64), torch.zeros(2, rows, columns).double()
    side[0, rows // 2] = randn(columns)
    side[1, :, columns // 2] = randn(rows)
    norms = side.flatten(1).norm(dim=1)
    torch.testing.assert_close(sketch(side.flatten(1)).norm(dim=1), norms)


def test_logra_is_two_projections():
    sketch = make("logra", 20, 12, 24, kept_rows=4)
    P = sketch(torch.eye(240).double()).view(20, 12, 4, 6)
    left, right = P[:, 0, :, 0] / P[0, 0, 0, 0], P[0, :, 0] / P[0, 0, 0, 0]
    torch.testing.assert_close(
        P, torch.einsum("ra,cb->rcab", left, right * P[0, 0, 0, 0]), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(P.abs(), torch.full_like(P, 24**-0.5), rtol=1e-6, atol=0)
    assert make("logra", 20, 12, 24).kept_rows == 4 and make("logra", 9, 9, 4096).kept_rows == 64
    assert make("logra", 5, 5, 7).kept_rows == 1


@every_kind
def test_it_is_linear_and_autograd_passes_through(kind):
    sketch = make(kind, 6, 5, 8)
    x = randn(2, 30).requires_grad_()
    torch.testing.assert_close(sketch(3 * x[0] - x[1]), 3 * sketch(x[0]) - sketch(x[1]))
    assert torch.autograd.gradcheck(sketch, x)
    assert torch.autograd.gradcheck(sketch.adjoint, randn(2, 8).requires_grad_())


# Unbiasedness and variance


def structures(rows, columns):
    """Matrices of unit norm, flattened, on which one sketch or another fails."""
    massive = randn(columns, seed=5)
    massive[0] = 100
    diagonal, row, column, entry, pairs = torch.zeros(5, rows, columns).double()
    diagonal.fill_diagonal_(1)
    row[rows // 2] = randn(columns)
    column[:, columns // 3] = randn(rows)
    entry[rows // 2, columns // 3] = 1
    pairs[:2, : columns // 2 + 1 : columns // 2] = 1
    x = {
        "dense": randn(rows, columns),
        "token": torch.outer(randn(rows), randn(columns, seed=1)),
        "massive activation": torch.outer(randn(rows), massive),
        "constant": torch.ones(rows, columns).double(),
        "heavy tail": randn(rows, columns) ** 9,
        "diagonal": diagonal,
        "antidiagonal": diagonal.flip(1),
        "row": row,
        "column": column,
        "entry": entry,
        "half a circle apart": pairs,
    }
    return list(x), torch.stack([(v / v.norm()).flatten() for v in x.values()])


def squared_norms(kind, rows, columns, D, seeds, **options):
    names, x = structures(rows, columns)
    squares = np.stack(
        [
            make(kind, rows, columns, D, seed, **options)(x).square().sum(1).numpy()
            for seed in range(seeds)
        ]
    )
    assert (np.abs(squares.mean(0) - 1) < 4 * squares.std(0) / seeds**0.5 + 1e-6).all()
    return dict(zip(names, D * squares.var(0), strict=True))


@pytest.mark.parametrize(
    ("rows", "columns", "circle"), [(64, 64, 64), (40, 60, 64), (60, 40, 64), (50, 16, 16)]
)
def test_tensorsketch_is_a_countsketch_on_every_structure(rows, columns, circle):
    """D Var is at most 2 D/(D-1) where no side is longer than D; 2 where the energy is spread."""
    assert make("tensorsketch", rows, columns, 64).circle == circle
    scaled = squared_norms("tensorsketch", rows, columns, 64, 1000)
    assert max(scaled.values()) < 2.5, scaled
    assert 1.6 < scaled["dense"] < 2.5 and scaled["token"] > 1.4
    assert scaled["row"] < 1e-9 and scaled["column"] < 1e-9 and scaled["entry"] < 1e-9


@pytest.mark.parametrize(
    ("rows", "columns", "bound"), [(64, 30, 4), (30, 64, 4), (50, 50, 6), (20, 20, 6)]
)
def test_tensorsketch_with_sides_longer_than_the_sketch(rows, columns, bound):
    scaled = squared_norms("tensorsketch", rows, columns, 32 if bound == 4 else 16, 600)
    assert max(scaled.values()) < 1.25 * bound, scaled


def test_tensorsketch_variance_of_inner_products():
    """Var<Sx, Sy> = 1/(D-1) sum over pairs of other rows and columns of (x_i y_j + x_j y_i)^2.

    On circles longer than twice the shorter side, where no two pairs of a rectangle can meet.
    """
    rows, columns, D = 24, 8, 25
    x, y = randn(2, rows * columns)
    y += 0.5 * x
    pairs = (torch.outer(x, y) + torch.outer(y, x)).square()
    r, c = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    apart = (r[:, None] < r) & (c[:, None] != c)
    expected = pairs[apart].sum().item() / (D - 1)
    sketches = (make("tensorsketch", rows, columns, D, seed) for seed in range(2000))
    products = torch.stack([torch.dot(*s(torch.stack([x, y]))) for s in sketches]).numpy()
    assert abs(products.var() / expected - 1) < 0.15
    assert abs(products.mean() - (x @ y).item()) < 4 * (expected / 2000) ** 0.5


@pytest.mark.parametrize("kept", [4, 16])
def test_logra_variance(kept):
    """That of a dense sketch on spread matrices, (1 + 2/k)(1 + 2k/D) - 1 for a single token."""
    D = 64
    scaled = squared_norms("logra", 60, 40, D, 800, kept_rows=kept)
    token = D * ((1 + 2 / kept) * (1 + 2 * kept / D) - 1)
    assert 0.7 < scaled["token"] / token < 1.4, (scaled, token)
    assert scaled["dense"] < 6 and scaled["entry"] < 1e-9


# Numbers


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [16, 1024])
def test_half_precision_accumulates_in_single(kind, dtype, D):
    sketch = make(kind, 60, 50, D)
    x = (3e4 * randn(2, 500, 50).sign()).to(dtype)
    d = (3e4 * randn(2, 500, 60, seed=1).sign()).to(dtype)
    got = sketch.of_factors(x, d)
    assert got.dtype == torch.float32 and got.isfinite().all()
    close(got.double(), sketch.of_factors(x.double(), d.double()), 1e-5)
    close(sketch.of_factors(x, d.float()), got, 1e-6)
    indices = torch.arange(500).remainder(60).expand(2, -1)
    close(sketch.of_lookups(indices, x), sketch.of_lookups(indices, x.float()), 1e-6)


@every_kind
@pytest.mark.parametrize("D", [16, 1024])
def test_tiny_gradients_and_large_activations_lose_nothing(kind, D):
    """Scales of the two factors never meet: powers of two pass through bit by bit."""
    sketch = make(kind, 60, 50, D)
    x, d = randn(2, 30, 50, dtype=torch.float32), randn(2, 30, 60, dtype=torch.float32, seed=1)
    whole = sketch.of_factors(x, d)
    assert torch.equal(sketch.of_factors(x * 2.0**60, d * 2.0**-60), whole)
    assert torch.equal(sketch.of_factors(x * 2.0**-60, d * 2.0**60), whole)
    scales = 10.0 ** randn(2, 30, 1).clamp(-4, 4).mul(2)  # of each token: large x, small d
    x, d = (x * scales * 1e4).float(), (d / scales * 1e-8).float()
    close(sketch.of_factors(x, d).double(), sketch.of_factors(x.double(), d.double()), 1e-5)


@every_kind
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("D", [16, 1024])
def test_what_is_not_finite_surfaces_in_its_example_alone(kind, bad, D):
    sketch = make(kind, 60, 50, D)
    for spoilt in range(2):
        factors = [randn(3, 30, 50), randn(3, 30, 60)]
        factors[spoilt][1, 4, 7] = bad
        finite = sketch.of_factors(*factors).isfinite().all(1)
        assert finite.tolist() == [True, False, True]
    d = randn(3, 30, 50)
    d[1, 4, 7] = bad
    finite = sketch.of_lookups(torch.zeros(3, 30, dtype=torch.int64), d).isfinite().all(1)
    assert finite.tolist() == [True, False, True]


@every_kind
@pytest.mark.parametrize("D", [16, 30, 1024])
@pytest.mark.parametrize("T", [1, 7, 600])
def test_an_example_does_not_depend_on_its_batch(kind, D, T, monkeypatch):
    monkeypatch.setattr(tensorsketch, "_CHUNK", 2**11)
    sketch = make(kind, 60, 50, D)
    x, d = randn(9, T, 50, dtype=torch.float32), randn(9, T, 60, dtype=torch.float32, seed=1)
    whole = sketch.of_factors(x, d)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    close(sketch.of_factors(x[order], d[order]), whole[order], 1e-6)
    for part in (slice(0, 1), slice(3, 8)):
        close(sketch.of_factors(x[part], d[part]), whole[part], 1e-6)
    apart = x.permute(2, 0, 1).contiguous().permute(1, 2, 0), d.repeat(1, 1, 2)[..., ::2]
    assert not any(factor.is_contiguous() for factor in apart)
    close(sketch.of_factors(*apart), sketch.of_factors(x, apart[1].contiguous()), 1e-6)
    halves = [slice(0, T // 2), slice(T // 2, T)]
    close(sum(sketch.of_factors(x[:, t], d[:, t]) for t in halves), whole, 2e-6)


@every_kind
def test_threads_do_not_matter(kind):
    sketch = make(kind, 60, 50, 64)
    x, d = randn(9, 40, 50, dtype=torch.float32), randn(9, 40, 60, dtype=torch.float32, seed=1)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(sketch.of_factors(x, d))
    finally:
        torch.set_num_threads(threads)
    close(*found, 1e-6)


def test_long_sequences_are_streamed():
    """60,000 tokens on 4,096 buckets: a gigabyte, if all spectra existed at once."""
    code = """
        import resource, torch
        from dsel_assets.sketching.tensorsketch import TensorSketch
        torch.set_num_threads(1)
        sketch = TensorSketch(512 * 600, 4096, columns=512)
        x = torch.ones(1, 1).expand(60_000, 512)[None]
        d = torch.ones(1, 1).expand(60_000, 600)[None]
        sketch.of_factors(x[:, :300], d[:, :300])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sketch.of_factors(x, d)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 32 * 1024  # KiB


# What else a sketch promises


@every_kind
def test_nothing_in_nothing_out(kind):
    sketch = make(kind, 6, 5, 8)
    for n, T in ((0, 3), (2, 0), (0, 0)):
        got = sketch.of_factors(torch.zeros(n, T, 5), torch.zeros(n, T, 6).double())
        assert got.shape == (n, 8) and not got.any() and got.dtype == torch.float64
        indices = torch.zeros(n, T, dtype=torch.int64)
        got = sketch.of_lookups(indices, torch.zeros(n, T, 5).half())
        assert got.shape == (n, 8) and not got.any() and got.dtype == torch.float32


@every_kind
def test_the_seed_and_the_name_choose_the_operator(kind):
    x, d = randn(1, 3, 20), randn(1, 3, 30, seed=1)

    def sketched(**key):
        return make(kind, 30, 20, 64, **key).of_factors(x, d)

    assert torch.equal(sketched(seed=5, name="a"), sketched(seed=5, name="a"))
    assert not torch.allclose(sketched(seed=5, name="a"), sketched(seed=6, name="a"))
    assert not torch.allclose(sketched(seed=5, name="a"), sketched(seed=5, name="b"))


def test_identity_tells_the_shape_and_the_options():
    variants = [
        make("tensorsketch", 30, 20, 64).identity,
        make("tensorsketch", 20, 30, 64).identity,
        make("logra", 30, 20, 64).identity,
        make("logra", 30, 20, 64, kept_rows=4).identity,
    ]
    assert len(set(variants)) == len(variants)
    assert make("logra", 30, 20, 64, kept_rows=8).identity == variants[2]
    assert json.loads(variants[1]) == {
        "kind": "tensorsketch",
        "version": 1,
        "in_features": 600,
        "out_features": 64,
        "seed": 3,
        "name": "fc.weight",
        "columns": 30,
    }


@every_kind
def test_errors_name_what_is_wrong(kind):
    sketch = make(kind, 6, 5, 8)
    x, d = torch.zeros(2, 3, 5), torch.zeros(2, 3, 6)
    with pytest.raises(ValueError, match=r"'fc.weight': the inputs must be \[n, T, 5\].*\(2, 5\)"):
        sketch.of_factors(x[:, 0], d)
    with pytest.raises(ValueError, match=r"the gradients must be \[n, T, 6\].*\(2, 3, 5\)"):
        sketch.of_factors(x, x)
    with pytest.raises(ValueError, match=r"tokens differ: \(2, 3\) and \(2, 2\)"):
        sketch.of_factors(x, d[:, :2])
    with pytest.raises(TypeError, match=r"inputs must be floating point, got torch.int64"):
        sketch.of_factors(x.long(), d)
    with pytest.raises(ValueError, match=r"must be \[n, T, 5\]"):
        sketch.of_lookups(torch.zeros(2, 3, dtype=torch.int64), d)
    with pytest.raises(ValueError, match="tokens differ"):
        sketch.of_lookups(torch.zeros(2, 4, dtype=torch.int64), x)
    for wrong in (-1, 6):
        with pytest.raises(IndexError, match=f"'fc.weight': indices must be 0 to 5, got {wrong}"):
            sketch.of_lookups(torch.full((2, 3), wrong), x)
    with pytest.raises(ValueError, match="must be 30"):
        sketch(torch.zeros(2, 6))
    for columns in (0, -5, 4):
        with pytest.raises(ValueError, match="columns must divide the 30 entries"):
            KINDS[kind](30, 8, columns=columns)


@pytest.mark.parametrize("kept", [0, 3, -2, 16])
def test_logra_refuses_rows_that_do_not_divide(kept):
    with pytest.raises(ValueError, match=f"kept_rows must divide 8, got {kept}"):
        make("logra", 6, 5, 8, kept_rows=kept)
