"""What holds exactly for every sketch: adjointness, linearity, invariance of the bits, identity."""

import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch

from dsel_assets.sketching import KINDS, make_sketch
from dsel_assets.sketching.affd import whole_affd
from dsel_assets.sketching.hadamard import hadamard

SIZES = [(1, 1), (5, 8), (64, 64), (100, 7), (1000, 96), (3000, 1024), (20_000, 33), (40_001, 256)]
every_kind = pytest.mark.parametrize("kind", sorted(KINDS))


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@every_kind
@pytest.mark.parametrize(("p", "D"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_adjoint(kind, p, D, dtype, tolerance):
    if kind == "gaussian" and p * D > 10**6:
        p = 10**6 // D
    sketch = make_sketch(kind, p, D, seed=1, name="w")
    x, y = randn(3, p, dtype=dtype), randn(3, D, dtype=dtype, seed=1)
    left, right = (sketch(x) * y).sum(-1), (x * sketch.adjoint(y)).sum(-1)
    scale = sketch(x).norm(dim=-1) * y.norm(dim=-1)
    assert sketch(x).shape == (3, D) and sketch.adjoint(y).shape == (3, p)
    assert sketch(x).dtype == sketch.adjoint(y).dtype == dtype
    assert ((left - right).abs() <= tolerance * scale).all()


@every_kind
def test_linear_and_zero(kind):
    sketch = make_sketch(kind, 700, 48)
    x = randn(2, 700, dtype=torch.float64)
    torch.testing.assert_close(sketch(3 * x[0] - x[1]), 3 * sketch(x[0]) - sketch(x[1]))
    assert not sketch(torch.zeros(700)).any() and not sketch.adjoint(torch.zeros(48)).any()


@every_kind
def test_leading_dimensions(kind):
    sketch = make_sketch(kind, 70, 16)
    x = randn(2, 3, 70)
    assert sketch(x).shape == (2, 3, 16) and sketch(x[0, 0]).shape == (16,)
    assert torch.equal(sketch(x)[1, 2], sketch(x[1, 2]))
    assert sketch(x[:, :0]).shape == (2, 0, 16) and sketch.adjoint(x[:0, 0, :16]).shape == (0, 70)


@every_kind
@pytest.mark.parametrize(("p", "D"), [(2500, 100), (33_000, 64)])
def test_bits_of_a_row_depend_on_the_row_alone(kind, p, D):
    if kind == "gaussian":
        p = 2500
    sketch = make_sketch(kind, p, D)
    x = randn(64, p)
    whole = sketch(x)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sketch(x[order]), whole[order])
    assert torch.equal(torch.cat([sketch(part) for part in x.split(7)]), whole)
    assert torch.equal(torch.stack([sketch(row) for row in x[:5]]), whole[:5])
    assert torch.equal(sketch(x.T.contiguous().T), whole)
    back = sketch.adjoint(whole)
    assert torch.equal(torch.stack([sketch.adjoint(row) for row in whole[:5]]), back[:5])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(sketch(x), whole)
            assert torch.equal(sketch.adjoint(whole), back)
    finally:
        torch.set_num_threads(threads)


@every_kind
def test_the_seed_and_the_name_choose_the_operator(kind):
    x = randn(300)

    def sketched(**key):
        return make_sketch(kind, 300, 32, **key)(x)

    assert torch.equal(sketched(seed=5, name="a"), sketched(seed=5, name="a"))
    assert not torch.allclose(sketched(seed=5, name="a"), sketched(seed=6, name="a"))
    assert not torch.allclose(sketched(seed=5, name="a"), sketched(seed=5, name="b"))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_single(kind, dtype):
    sketch = make_sketch(kind, 5000, 64)
    x = (1e4 * randn(2, 5000).sign()).to(dtype)
    assert sketch(x).dtype == torch.float32
    assert torch.equal(sketch(x), sketch(x.float()))
    assert sketch(x).isfinite().all()
    assert sketch.adjoint(torch.ones(64, dtype=dtype)).dtype == torch.float32


@every_kind
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_surfaces(kind, bad):
    sketch = make_sketch(kind, 300, 32)
    x = randn(2, 300)
    x[1, 7] = bad
    y = sketch(x)
    assert y[0].isfinite().all() and not y[1].isfinite().all()
    if np.isnan(bad):
        assert y[1].isnan().any()


@every_kind
def test_errors_name_what_is_wrong(kind):
    sketch = make_sketch(kind, 300, 32, name="fc.weight")
    with pytest.raises(ValueError, match=r"fc\.weight.*must be 300.*\(4, 299\)"):
        sketch(torch.zeros(4, 299))
    with pytest.raises(ValueError, match="must be 32"):
        sketch.adjoint(torch.zeros(33))
    with pytest.raises(ValueError, match="must be 300"):
        sketch(torch.tensor(1.0))
    with pytest.raises(TypeError, match="floating point"):
        sketch(torch.zeros(300, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 1"):
        make_sketch(kind, 300, 0)


def test_unknown_kind_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'nosuch'.*gaussian, countsketch, affd"):
        make_sketch("nosuch", 10, 4)


@every_kind
def test_identity_holds_across_processes(kind):
    code = (
        "from dsel_assets.sketching import make_sketch\n"
        f"sketch = make_sketch({kind!r}, 50, 8, seed=2, name='fc.weight')\n"
        "import torch\n"
        "print(sketch.identity, sketch(torch.arange(50.0)).tolist(), sep='|')"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    sketch = make_sketch(kind, 50, 8, seed=2, name="fc.weight")
    assert other.strip() == f"{sketch.identity}|{sketch(torch.arange(50.0)).tolist()}"
    assert json.loads(sketch.identity) == {
        "kind": kind,
        "version": 1,
        "in_features": 50,
        "out_features": 8,
        "seed": 2,
        "name": "fc.weight",
    }


@pytest.mark.parametrize("n", [1, 2, 8, 256])
def test_hadamard(n):
    x = randn(n, 3, dtype=torch.float64)
    expected = torch.from_numpy(scipy.linalg.hadamard(n).astype(float)) @ x
    torch.testing.assert_close(hadamard(x), expected)
    torch.testing.assert_close(hadamard(hadamard(x)), n * x)


def test_hadamard_refuses_other_sizes():
    with pytest.raises(ValueError, match="power of two, got 12"):
        hadamard(torch.zeros(12))


@pytest.mark.parametrize(("p", "D"), [(512, 64), (512, 8), (300, 64), (1024, 1024), (900, 100)])
def test_affd_is_the_papers_operator(p, D):
    """One block against dense N x N matrices, row permutations of H' included."""
    sketch = make_sketch("affd", p, D)
    N, factors = sketch.sizes[0], sketch.factors[0]
    x = torch.nn.functional.pad(randn(p, dtype=torch.float64), (0, N - p))
    signs = torch.nn.functional.pad(sketch.signs.double(), (0, N - p), value=1)
    gaussians = sketch.gains.double() * N**0.5
    columns = [sketch.leading.argsort(), sketch.trailing.argsort()]
    plain = [torch.arange(n) for n in factors]
    expected = sketch(x[:p])
    got = whole_affd(x, signs, gaussians, plain, columns, D)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)

    # G P' = P' G~: permuted rows of H' are permuted Gaussians and columns of H''
    rows = [torch.randperm(n, generator=torch.Generator().manual_seed(0)) for n in factors]
    flat = (rows[0][:, None] * factors[1] + rows[1]).flatten()
    moved = [column[row] for column, row in zip(columns, rows, strict=True)]
    got = whole_affd(x, signs, gaussians[flat], rows, moved, D)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_affd_blocks():
    def sizes(p, D):
        return make_sketch("affd", p, D).sizes

    assert sizes(10, 1000) == [4096]
    assert sizes(3000, 1024) == [4096]
    assert sizes(40_001, 256) == [2**14, 2**14, 2**13]
    assert sizes(2**15, 256) == [2**14, 2**14]
    assert sizes(150_000, 20_000) == [2**17, 2**17]


def test_countsketch_by_its_definition():
    sketch = make_sketch("countsketch", 1000, 96)
    x = randn(1000, dtype=torch.float64)
    expected = torch.zeros(96, dtype=torch.float64)
    for i in range(1000):
        run, place = divmod(i, 96)
        expected[(place + sketch.shifts[run]) % 96] += sketch.signs[i] * x[i]
    torch.testing.assert_close(sketch(x), expected)


@pytest.mark.parametrize("p", [1, 50, 96])
def test_countsketch_keeps_the_norm_of_a_run(p):
    x = randn(p, dtype=torch.float64)
    assert abs(make_sketch("countsketch", p, 96)(x).norm() / x.norm() - 1) < 1e-14
