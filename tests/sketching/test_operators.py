"""What holds exactly for every sketch: adjointness, linearity, invariance of the bits, identity."""

import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch

from dsel_assets.sketching import KINDS, ModelSketch, make_sketch
from dsel_assets.sketching.hadamard import hadamard
from dsel_assets.sketching.versions import version_of

SIZES = [(1, 1), (1, 5), (5, 8), (64, 64), (100, 7), (1000, 96), (3000, 1024), (4096, 128)]
LARGE = [(20_000, 33), (40_001, 256)]
every_kind = pytest.mark.parametrize("kind", sorted(KINDS))


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_adjoint(make, dtype, tolerance):
    for p, D in SIZES + LARGE:
        p = make.affordable(p, D)
        sketch = make(p, D, seed=1, name="w")
        x, y = randn(3, p, dtype=dtype), randn(3, D, dtype=dtype, seed=1)
        Sx, back = sketch(x), sketch.adjoint(y)
        assert Sx.shape == (3, D) and back.shape == (3, p)
        assert Sx.dtype == back.dtype == dtype
        left, right = (Sx * y).sum(-1), (x * back).sum(-1)
        scale = Sx.norm(dim=-1) * y.norm(dim=-1)
        assert ((left - right).abs() <= tolerance * scale).all(), (p, D)


def test_adjoint_is_the_transpose(make):
    """As matrices, entry by entry."""
    for p, D in ((37, 12), (12, 37), (1, 3)):
        sketch = make(p, D, seed=3)
        S = sketch(torch.eye(p, dtype=torch.float64)).T
        back = sketch.adjoint(torch.eye(D, dtype=torch.float64))
        torch.testing.assert_close(back, S, rtol=1e-12, atol=1e-12)


def test_linear_and_zero(make):
    sketch = make(700, 48)
    x = randn(2, 700, dtype=torch.float64)
    torch.testing.assert_close(sketch(3 * x[0] - x[1]), 3 * sketch(x[0]) - sketch(x[1]))
    assert not sketch(torch.zeros(700)).any() and not sketch.adjoint(torch.zeros(48)).any()


def test_leading_dimensions(make):
    sketch = make(70, 16)
    x = randn(2, 3, 70)
    assert sketch(x).shape == (2, 3, 16) and sketch(x[0, 0]).shape == (16,)
    assert torch.equal(sketch(x)[1, 2], sketch(x[1, 2]))
    assert sketch(x[:, :0]).shape == (2, 0, 16) and sketch.adjoint(x[:0, 0, :16]).shape == (0, 70)


@pytest.mark.parametrize(("p", "D"), [(2500, 100), (33_000, 64)])
def test_bits_of_a_row_depend_on_the_row_alone(make, p, D):
    p = make.affordable(p, D)
    sketch = make(p, D)
    x = randn(11, p)
    whole = sketch(x)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sketch(x[order]), whole[order])
    assert torch.equal(torch.cat([sketch(part) for part in x.split(4)]), whole)
    assert torch.equal(torch.stack([sketch(row) for row in x[:2]]), whole[:2])
    assert torch.equal(sketch(x.T.contiguous().T), whole)
    back = sketch.adjoint(whole)
    assert torch.equal(torch.stack([sketch.adjoint(row) for row in whole[:2]]), back[:2])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(sketch(x), whole)
            assert torch.equal(sketch.adjoint(whole), back)
    finally:
        torch.set_num_threads(threads)


def test_the_seed_and_the_name_choose_the_operator(make):
    x = randn(300)

    def sketched(**key):
        return make(300, 32, **key)(x)

    assert torch.equal(sketched(seed=5, name="a"), sketched(seed=5, name="a"))
    assert not torch.allclose(sketched(seed=5, name="a"), sketched(seed=6, name="a"))
    assert not torch.allclose(sketched(seed=5, name="a"), sketched(seed=5, name="b"))


def test_nothing_of_the_size_of_the_input_is_kept(make):
    """Of a matrix: nothing of its size, but of its sides'."""
    sides = {"columns": 200} if make.kind in ("tensorsketch", "logra") else {}
    sketch = make_sketch(make.kind, 40_000, 16, **make.options, **sides)
    sketch(torch.zeros(40_000))
    kept = [v for v in vars(sketch).values() if isinstance(v, torch.Tensor)]
    kept += [*sketch.parameters(), *sketch.buffers()]
    assert sum(t.numel() for t in kept) <= 40_000 // 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_single(make, dtype):
    sketch = make(5000, 64)
    x = (1e4 * randn(2, 5000).sign()).to(dtype)
    assert sketch(x).dtype == torch.float32
    assert torch.equal(sketch(x), sketch(x.float()))
    assert sketch(x).isfinite().all()
    y = torch.full((64,), 1e4, dtype=dtype)
    assert torch.equal(sketch.adjoint(y), sketch.adjoint(y.float()))
    assert sketch.adjoint(y).dtype == torch.float32


def test_large_entries_do_not_overflow(make):
    """1e5 lies beyond half precision, through which some kernels pass their input."""
    y = make(3000, 64)(torch.full((3000,), 1e5))
    assert y.isfinite().all() and y.norm() > 1e5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_surfaces(make, bad):
    sketch = make(300, 32)
    for sketched, x in ((sketch, randn(2, 300)), (sketch.adjoint, randn(2, 32))):
        x[1, 7] = bad
        y = sketched(x)
        assert y[0].isfinite().all()
        assert not y[1].isfinite().all()
        if np.isnan(bad):
            assert y[1].isnan().any()


def test_errors_name_what_is_wrong(make):
    sketch = make(300, 32, name="fc.weight")
    with pytest.raises(ValueError, match=r"fc\.weight.*must be 300.*\(4, 299\)"):
        sketch(torch.zeros(4, 299))
    with pytest.raises(ValueError, match="must be 32"):
        sketch.adjoint(torch.zeros(33))
    with pytest.raises(ValueError, match="must be 300"):
        sketch(torch.tensor(1.0))
    with pytest.raises(TypeError, match="floating point"):
        sketch(torch.zeros(300, dtype=torch.int64))
    for p, D in ((300, 0), (0, 32), (-5, 32), (300, -1)):
        with pytest.raises(ValueError, match="at least 1"):
            make(p, D)


def test_unknown_kind_names_the_known_ones():
    with pytest.raises(ValueError, match=f"'nosuch'; use one of {', '.join(KINDS)}"):
        make_sketch("nosuch", 10, 4)


@every_kind
def test_unknown_options_are_refused_by_name(kind):
    with pytest.raises(ValueError, match=f"option of {kind}: colour, seeds; it takes"):
        make_sketch(kind, 10, 4, seeds=3, colour="red")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("affd", {"preconditioner": "fft"}, "affd: preconditioner; it takes none"),
        ("sjlt", {"layout": "listed"}, "sjlt: layout; it takes nonzeros"),
        ("sjlt", {"nonzeros": 0}, "nonzeros must be at least 1, got 0"),
        ("afjl", {"block": 0}, "block must be at least 1, got 0"),
        ("afjl", {"preconditioner": "dct"}, "hadamard, fft, orthogonal, got 'dct'"),
        ("fjl", {"preconditioner": None}, "hadamard, fft, orthogonal, got None"),
        ("affd_whole", {"preconditioner": ""}, "hadamard, fft, orthogonal, got ''"),
        ("qk", {"layout": "square"}, "balanced or listed, got 'square'"),
    ],
)
def test_bad_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        make_sketch(kind, 10, 4, **options)


def test_options_are_part_of_the_identity(make):
    sketch = make(50, 8)
    assert sketch.options.items() >= make.options.items()
    assert json.loads(sketch.identity).items() >= sketch.options.items()
    assert make_sketch(make.kind, 50, 8, **sketch.options).identity == sketch.identity
    assert (sketch.identity == make_sketch(make.kind, 50, 8).identity) == (not make.options)


def test_identity_holds_across_processes():
    """Of all kinds together, since a process takes seconds to start."""
    code = (
        "import json, torch\n"
        "from dsel_assets.sketching import KINDS, make_sketch\n"
        "sketches = [make_sketch(kind, 50, 8, seed=2, name='fc.weight') for kind in KINDS]\n"
        "x = torch.arange(50.0)\n"
        "print(json.dumps({s.kind: [s.identity, s(x).tolist()] for s in sketches}))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    other = json.loads(printed)
    assert other.keys() == KINDS.keys()
    for kind, (identity, sketched) in other.items():
        sketch = make_sketch(kind, 50, 8, seed=2, name="fc.weight")
        assert [identity, sketched] == [sketch.identity, sketch(torch.arange(50.0)).tolist()]
        assert json.loads(identity) == {
            "kind": kind,
            "version": version_of(kind),
            "in_features": 50,
            "out_features": 8,
            "seed": 2,
            "name": "fc.weight",
            **sketch.options,
        }


def test_sketches_in_pieces_are_the_sketch_of_the_concatenation(make):
    """Two tensors' sketches add up to one operator [S_a S_b], adjoint included."""
    if make.kind in ("tensorsketch", "logra"):
        pytest.skip("knows a matrix from a vector: see test_model")
    shapes = {"a": (70,), "b": (5, 9)}
    sketch = ModelSketch(shapes, make.kind, 24, 3, **make.options)
    a, b = make(70, 24, 3, "a"), make(45, 24, 3, "b")
    x = randn(2, 115, dtype=torch.float64)
    together = sketch({"a": x[:, :70], "b": x[:, 70:].unflatten(1, (5, 9))})
    torch.testing.assert_close(together, a(x[:, :70]) + b(x[:, 70:]))
    y = randn(2, 24, dtype=torch.float64)
    torch.testing.assert_close(sketch.adjoint(y)["b"].flatten(1), b.adjoint(y))


@pytest.mark.parametrize("n", [1, 2, 8, 256])
def test_hadamard(n):
    x = randn(n, 3, dtype=torch.float64)
    expected = torch.from_numpy(scipy.linalg.hadamard(n).astype(float)) @ x
    torch.testing.assert_close(hadamard(x), expected)
    torch.testing.assert_close(hadamard(hadamard(x)), n * x)


def test_hadamard_refuses_other_sizes():
    with pytest.raises(ValueError, match="power of two, got 12"):
        hadamard(torch.zeros(12))
