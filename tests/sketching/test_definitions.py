"""Every operator against its definition, written down with dense matrices."""

import pytest
import scipy.linalg
import torch
from torch.nn.functional import pad

from dsel_assets.sketching import make_sketch
from dsel_assets.sketching.kronecker import haar, kronecker
from dsel_assets.sketching.philox import integers, normals, permutations, signs
from dsel_assets.sketching.preconditioners import PRECONDITIONERS

CPU = torch.device("cpu")
NAMES = sorted(PRECONDITIONERS)
LOOSE = {"rtol": 1e-6, "atol": 1e-6}  # Gaussians and factors are in float32


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def matrix(sketch):
    return sketch(torch.eye(sketch.in_features, dtype=torch.float64)).T


def orthonormal_hadamard(n):
    return torch.from_numpy(scipy.linalg.hadamard(n) / n**0.5)


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, **LOOSE)


def paper_affd(signs, gaussians, rows, columns, D):
    """R_D sqrt(N/D) H'' G H' B. rows, columns: a permutation for each factor of H' and of H''."""
    first = second = torch.ones(1, 1, dtype=torch.float64)
    for row, column in zip(rows, columns, strict=True):
        factor = orthonormal_hadamard(len(row))
        first = torch.kron(first, factor[row])
        second = torch.kron(second, factor[:, column])
    S = second @ (gaussians[:, None] * first * signs)
    return (len(S) / D) ** 0.5 * S[:D]


@pytest.mark.parametrize(("p", "D"), [(512, 64), (512, 8), (300, 64), (256, 256), (900, 100)])
def test_affd(p, D):
    """One block, without and with permuted rows of H'."""
    sketch = make_sketch("affd", p, D)
    N = sketch.sizes[0]
    flips = pad(signs(sketch.key("signs"), 0, p).double(), (0, N - p), value=1)
    gaussians = sketch.gains(0, N, 1).double() * N**0.5
    columns = [order[0].argsort() for order in sketch.permutations(0, N, 1)]
    plain = [torch.arange(len(column)) for column in columns]
    expected = matrix(sketch)
    assert_close(paper_affd(flips, gaussians, plain, columns, D)[:, :p], expected)

    # G P' = P' G~: permuted rows of H' are permuted Gaussians and columns of H''
    rows = [torch.randperm(len(c), generator=torch.Generator().manual_seed(0)) for c in columns]
    flat = (rows[0][:, None] * len(rows[1]) + rows[1]).flatten()
    moved = [column[row] for column, row in zip(columns, rows, strict=True)]
    assert_close(paper_affd(flips, gaussians[flat], rows, moved, D)[:, :p], expected)


def test_affd_blocks():
    def sizes(p, D):
        return make_sketch("affd", p, D).sizes

    assert sizes(10, 1000) == [4096]
    assert sizes(3000, 1024) == [4096]
    assert sizes(40_001, 256) == [2**14, 2**14, 2**13]
    assert sizes(2**15, 256) == [2**14, 2**14]
    assert sizes(150_000, 20_000) == [2**17, 2**17]


@pytest.mark.parametrize(("p", "D"), [(512, 64), (300, 48), (8, 100), (1, 1)])
def test_affd_whole(p, D):
    sketch = make_sketch("affd_whole", p, D)
    N = 1 << (max(p, D) - 1).bit_length()
    leading = 1 << (N.bit_length() - 1) // 2
    flips = pad(signs(sketch.key("signs"), 0, p).double(), (0, N - p), value=1)
    gaussians = normals(sketch.key("gains"), 0, N)
    rows, columns = (
        [
            permutations(sketch.key(f"{name}/{i}"), 0, 1, size)[0]
            for i, size in enumerate((leading, N // leading))
        ]
        for name in ("rows", "columns")
    )
    assert_close(matrix(sketch), paper_affd(flips, gaussians, rows, columns, D)[:, :p])


@pytest.mark.parametrize(("p", "D"), [(512, 64), (300, 48), (5, 8)])
def test_afjl(p, D):
    """R_D sqrt(N/D) G H' B, the factors of H' permuted, of N/D' and D' points."""
    sketch = make_sketch("afjl", p, D)
    (N,), points = sketch.sizes, 1 << (D - 1).bit_length()
    order = permutations(sketch.key(f"rows/{points}"), 0, 1, points)[0]
    rows = torch.kron(orthonormal_hadamard(N // points), orthonormal_hadamard(points)[order])
    gaussians = normals(sketch.key("gains"), 0, D)[:, None]
    expected = (N / D) ** 0.5 * gaussians * rows[:D, :p] * signs(sketch.key("signs"), 0, p)
    assert_close(matrix(sketch), expected)


@pytest.mark.parametrize(("p", "D"), [(512, 64), (300, 48), (5, 8)])
def test_srht_of_one_block(p, D):
    """sqrt(n/D) M R H B with signs M, every row at most once."""
    sketch = make_sketch("srht", p, D)
    (n,) = sketch.sizes
    rows = permutations(sketch.key(f"rows/{n}"), 0, 1, n)[0, :D]
    left, right = signs(sketch.key("gains"), 0, D)[:, None], signs(sketch.key("signs"), 0, p)
    expected = (n / D) ** 0.5 * left * orthonormal_hadamard(n)[rows, :p] * right
    assert_close(matrix(sketch), expected)


def test_srht_blocks_are_independent_sketches():
    p, D = 2**14 + 300, 20
    sketch = make_sketch("srht", p, D)
    assert sketch.sizes == [2**14, 512]
    x = randn(1, p)
    first, second = (pad(x[:, : 2**14], (0, 300)), pad(x[:, 2**14 :], (2**14, 0)))
    torch.testing.assert_close(sketch(first) + sketch(second), sketch(x))
    S = sketch(pad(torch.eye(300, dtype=torch.float64), (2**14, 0))).T
    assert_close((S * D**0.5).abs(), torch.ones(D, 300, dtype=torch.float64))
    constant = sketch(pad(torch.eye(1, 2, dtype=torch.float64), (2**14, 298)))
    assert constant.unique().numel() == 2  # the first coordinate: signs, not one direction


@pytest.mark.parametrize(("p", "D"), [(512, 64), (300, 48), (5, 8), (3, 100)])
def test_fjl(p, D):
    """sqrt(N/D) Gs H B, one Gaussian in each row of Gs."""
    sketch = make_sketch("fjl", p, D)
    N = 1 << (p - 1).bit_length()
    rows = integers(sketch.key("rows"), 0, D, N)
    gaussians = normals(sketch.key("gains"), 0, D)[:, None]
    H = orthonormal_hadamard(N)[rows, :p]
    assert_close(matrix(sketch), (N / D) ** 0.5 * gaussians * H * signs(sketch.key("signs"), 0, p))


@pytest.mark.parametrize(("p", "D"), [(512, 64), (300, 48), (5, 8)])
def test_ffd(p, D):
    """sum_b B_b H Pi_b^T G_b H on runs of D' coordinates, cut to D."""
    sketch = make_sketch("ffd", p, D)
    points = 1 << (D - 1).bit_length()
    runs = -(-p // points)
    shape = (runs, points)
    flips = signs(sketch.key("signs"), 0, runs * points).view(shape)
    gains = normals(sketch.key("gains"), 0, runs * points).view(shape)
    orders = permutations(sketch.key("orders"), 0, runs, points)
    H = orthonormal_hadamard(points)
    blocks = [
        flip[:, None] * (H @ (gain[:, None] * H)[order])
        for flip, gain, order in zip(flips, gains, orders, strict=True)
    ]
    assert_close(matrix(sketch), torch.cat(blocks, 1)[:D, :p] * (points / D) ** 0.5)


@pytest.mark.parametrize(("p", "D", "c"), [(500, 64, 4), (500, 50, 4), (70, 3, 4), (50, 9, 9)])
def test_sjlt(p, D, c):
    """c distinct places in a column, +-1/sqrt(c) each, all places alike and all signs fair."""
    sketch = make_sketch("sjlt", p, D, nonzeros=c)
    S, c = matrix(sketch), min(c, D)
    assert ((S != 0).sum(0) == c).all()
    torch.testing.assert_close(S.abs().sum(0), torch.full((p,), c**0.5, dtype=torch.float64))
    filled = (S != 0).sum(1).double()
    assert ((filled - p * c / D).abs() <= 4 * (p * c / D) ** 0.5).all()
    assert abs(S.sign().sum()) <= 4 * (p * c) ** 0.5


def test_sjlt_with_all_places_filled_is_dense():
    S = matrix(make_sketch("sjlt", 40, 6, nonzeros=100))
    torch.testing.assert_close(S.abs(), torch.full((6, 40), 6**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("layout", ["balanced", "listed"])
@pytest.mark.parametrize(("p", "D"), [(256, 64), (300, 48), (5000, 7), (1, 1), (3, 40)])
def test_qk(layout, p, D):
    """A cut of a Kronecker product of orthogonal matrices: S S^T = (N/D) I on all N coordinates."""
    N = 1 << (max(p, D) - 1).bit_length()
    S = matrix(make_sketch("qk", N, D, layout=layout))
    assert_close(S @ S.T * D / N, torch.eye(D, dtype=torch.float64))
    assert_close(matrix(make_sketch("qk", p, D, layout=layout)), S[:, :p])


def test_qk_listed_cuts_square_factors():
    sketch = make_sketch("qk", 2**13, 48, layout="listed")
    assert sketch.columns == (8, 1024) and sketch.rows == (1, 48)
    full = haar(sketch.key("factors"), sketch.columns, sketch.columns, CPU)
    x = randn(2**13, 2)
    expected = kronecker(full, x)[:48] * (2**13 / 48) ** 0.5
    assert_close(sketch(x.T), expected.T)


@pytest.mark.parametrize(
    ("p", "columns"),
    [(1, (1,)), (1024, (1024,)), (2**14, (16, 1024)), (2**21, (2, 1024, 1024))],
)
def test_qk_listed_factors(p, columns):
    assert make_sketch("qk", p, 1, layout="listed").columns == columns


def test_haar_is_orthogonal_and_even():
    """Equal in distribution to its negative and to its products with a rotation."""
    drawn = torch.stack(haar((1, 2), [3] * 4000, [3] * 4000, CPU)).double()
    torch.testing.assert_close(drawn @ drawn.mT, torch.eye(3).double().expand(4000, 3, 3), **LOOSE)
    squares = drawn.square().flatten(1)
    assert ((squares.mean(0) - 1 / 3).abs() < 4 * squares.std(0) / 4000**0.5).all()
    assert (drawn.mean(0).abs() < 4 * (3 * 4000) ** -0.5).all()
    assert abs(torch.det(drawn).mean()) < 4 / 4000**0.5


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_kronecker(batch):
    matrices = [randn(2, 3), randn(5, 4, seed=1), randn(1, 2, seed=2)]
    x = randn(24, batch)
    full = torch.kron(torch.kron(matrices[0], matrices[1]), matrices[2])
    torch.testing.assert_close(kronecker(matrices, x), full @ x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 2, 4, 64, 512])
def test_preconditioners_are_orthogonal(name, n):
    P = PRECONDITIONERS[name](n, n, (3, 4), CPU)
    eye = torch.eye(n, dtype=torch.float64)
    assert_close(P.forward(eye) @ P.forward(eye).T, eye)
    assert_close(P.adjoint(eye), P.forward(eye).T)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kept", [1, 2, 16, 128])
def test_truncated_is_the_cut_of_the_whole(name, kept):
    whole, cut = (PRECONDITIONERS[name](256, m, (3, 4), CPU) for m in (256, kept))
    x, y = randn(256, 2), randn(kept, 2)
    assert_close(cut.forward(x), whole.forward(x)[:kept])
    assert_close(cut.adjoint(y), whole.adjoint(pad(y, (0, 0, 0, 256 - kept))))


def test_the_fourier_preconditioner_is_the_real_transform():
    n = 16
    F = PRECONDITIONERS["fft"](n, n, (0, 0), CPU).forward(torch.eye(n, dtype=torch.float64))
    angle = 2 * torch.pi * torch.arange(n).double() / n
    rows = [torch.ones(n) * n**-0.5, torch.cos(n // 2 * angle) * n**-0.5]
    for k in range(1, n // 2):
        rows += [torch.cos(k * angle) * (2 / n) ** 0.5, -torch.sin(k * angle) * (2 / n) ** 0.5]
    torch.testing.assert_close(F, torch.stack([row.double() for row in rows]))


@pytest.mark.parametrize("name", NAMES)
def test_preconditioned_variants_are_compositions(name):
    """AFFD on all coordinates from the preconditioner's own dense matrix."""
    p, D = 200, 30
    sketch = make_sketch("affd_whole", p, D, preconditioner=name)
    make, eye = PRECONDITIONERS[name], torch.eye(256, dtype=torch.float64)
    first = make(256, 256, sketch.key("haar/first"), CPU).forward(eye)
    second = make(256, 256, sketch.key("haar/second"), CPU).forward(eye)
    gaussians = normals(sketch.key("gains"), 0, 256)[:, None]
    flips = signs(sketch.key("signs"), 0, p)
    if name == "orthogonal":
        flips = torch.ones(p)
    else:
        rows, columns = (
            (leading[0][:, None] * 16 + trailing[0]).flatten()
            for leading, trailing in (
                [permutations(sketch.key(f"{s}/{i}"), 0, 1, 16) for i in (0, 1)]
                for s in ("rows", "columns")
            )
        )
        first, second = first[rows], second[:, columns]
    expected = (256 / D) ** 0.5 * (second @ (gaussians * first[:, :p] * flips))[:D]
    assert_close(matrix(sketch), expected)


def test_countsketch():
    sketch = make_sketch("countsketch", 1000, 96)
    x = randn(1000)
    flips = signs(sketch.key("signs"), 0, 1000)
    shifts = integers(sketch.key("shifts"), 0, 11, 96)
    expected = torch.zeros(96, dtype=torch.float64)
    for i in range(1000):
        run, place = divmod(i, 96)
        expected[(place + shifts[run]) % 96] += flips[i] * x[i]
    torch.testing.assert_close(sketch(x), expected)


@pytest.mark.parametrize("p", [1, 50, 96])
def test_countsketch_keeps_the_norm_of_a_run(p):
    x = randn(p)
    assert abs(make_sketch("countsketch", p, 96)(x).norm() / x.norm() - 1) < 1e-14


@pytest.mark.parametrize("kind", ["countsketch", "sjlt", "srht", "rademacher"])
def test_the_norm_of_one_coordinate_is_kept(kind):
    for D in (64, 50):
        norms = make_sketch(kind, 300, D)(torch.eye(300, dtype=torch.float64)).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(300, dtype=torch.float64), **LOOSE)
