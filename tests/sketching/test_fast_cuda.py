"""Triton's kernels against plain torch: on a GPU, or without one in Triton's interpreter."""

import os
import sys

import numpy as np
import pytest
import torch
from packaging.version import Version

CUDA = torch.cuda.is_available()
if not CUDA:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip(
            "triton was imported before its interpreter was chosen", allow_module_level=True
        )
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton")
if (
    not CUDA
    and Version(triton.__version__) < Version("3.7")
    and Version(np.__version__) >= Version("2.4")
):
    pytest.skip("this interpreter of triton needs numpy < 2.4", allow_module_level=True)

import triton.language as tl  # noqa: E402

from dsel_assets.sketching import fast, fast_cuda, make_sketch, philox  # noqa: E402
from dsel_assets.sketching.fast import plain_torch  # noqa: E402
from dsel_assets.sketching.hadamard import hadamard  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
KEY = philox.stream_key(3, "conv.weight", "test")
ONES = 0xFFFFFFFF
SIZES = [(1, 1), (3, 2), (5, 8), (64, 64), (100, 7), (2500, 33), (3000, 1024), (18_000, 256)]
every_kind = pytest.mark.parametrize("kind", ["countsketch", "affd"])
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs CUDA")]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    if not CUDA:
        monkeypatch.setattr(fast, "_load", lambda name: fast_cuda)


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def close(got, expected, tolerance=1e-5 if CUDA else 2e-6):
    """Equal to so many times the root mean square of what is expected."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    scale = expected.double().square().mean().sqrt().item()
    assert (got - expected).abs().max().item() <= tolerance * scale


@every_kind
@pytest.mark.parametrize(("p", "D"), SIZES)
def test_equal_to_plain_torch(kind, p, D):
    sketch = make_sketch(kind, p, D, seed=2, name="w")
    x, y = randn(3, p), randn(3, D, seed=1)
    got, back = sketch(x), sketch.adjoint(y)
    with plain_torch():
        close(got, sketch(x))
        close(back, sketch.adjoint(y))
    left, right = (got * y).sum(-1), (x * back).sum(-1)
    assert ((left - right).abs() <= 1e-5 * got.norm(dim=-1) * y.norm(dim=-1)).all()


@every_kind
def test_bits_of_a_row_depend_on_the_row_alone(kind):
    sketch, x = make_sketch(kind, 5000, 120), randn(9, 5000)
    whole = sketch(x)
    back = sketch.adjoint(whole)
    order = torch.tensor([5, 0, 8, 3, 1, 7, 2, 6, 4], device=DEVICE)
    assert torch.equal(sketch(x[order]), whole[order])
    for rows in ([8], [1, 2, 3]):
        assert torch.equal(sketch(x[rows]), whole[rows])
        assert torch.equal(sketch.adjoint(whole[rows]), back[rows])


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_single(kind, dtype):
    sketch = make_sketch(kind, 5000, 64)
    x = (1e4 * randn(2, 5000)).to(dtype)
    close(sketch(x), sketch(x.float()))
    assert sketch.adjoint(torch.ones(64, dtype=dtype, device=DEVICE)).dtype == torch.float32


@every_kind
def test_double_precision(kind):
    sketch, x = make_sketch(kind, 3000, 64), randn(2, 3000, dtype=torch.float64)
    got, back = sketch(x), sketch.adjoint(x[:, :64])
    with plain_torch():
        close(got, sketch(x), tolerance=1e-14)
        close(back, sketch.adjoint(x[:, :64]), tolerance=1e-14)


@every_kind
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_surfaces_in_its_row(kind, bad):
    sketch, x = make_sketch(kind, 3000, 64), randn(2, 3000)
    x[1, 7] = bad
    y = sketch(x)
    assert y[0].isfinite().all() and not y[1].isfinite().all()
    y = randn(2, 64)
    y[1, 7] = bad
    x = sketch.adjoint(y)
    assert x[0].isfinite().all() and not x[1].isfinite().all()


@every_kind
def test_any_layout(kind):
    sketch, x = make_sketch(kind, 3000, 64), randn(6, 3000)
    y = sketch(x)
    back = sketch.adjoint(y)
    assert torch.equal(sketch(x.T.contiguous().T), y)
    assert torch.equal(sketch(torch.cat([x, x], dim=1)[:, :3000]), y)
    assert torch.equal(sketch(torch.stack([x, x], dim=2)[:, :, 1]), y)
    assert torch.equal(sketch(x[:1].expand(3, -1)), y[:1].expand(3, -1))
    assert torch.equal(sketch.adjoint(y.T.contiguous().T), back)
    assert sketch(x[:0]).shape == (0, 64) and sketch.adjoint(y[:0]).shape == (0, 3000)


def test_autograd_and_vmap_pass_through():
    sketch, x, y = make_sketch("affd", 300, 16), randn(4, 300), randn(16)
    gradient = torch.func.grad(lambda row: sketch(row) @ y)(x[0])
    close(gradient, sketch.adjoint(y))
    assert torch.equal(torch.func.vmap(sketch)(x), sketch(x))


def test_blocks_that_do_not_fit_are_left_to_torch():
    sketch, x = make_sketch("affd", 40_000, 5000), randn(2, 40_000)
    assert sketch.sizes[0] == 2**15
    got, back = sketch(x), sketch.adjoint(x[:, :5000])
    with plain_torch():
        close(got, sketch(x))
        close(back, sketch.adjoint(x[:, :5000]))


def test_affd_in_pieces_and_shares(monkeypatch):
    sketch, x = make_sketch("affd", 50_000, 1000), randn(1, 50_000)
    whole, back = sketch(x), sketch.adjoint(x[:, :1000])
    monkeypatch.setattr(fast_cuda, "_GAINS", 2**15)
    monkeypatch.setattr(fast_cuda, "_blocks", lambda count: (1, count))
    close(sketch(x), whole)
    assert torch.equal(sketch.adjoint(x[:, :1000]), back)


@pytest.mark.parametrize("n", [1, 2, 8, 512, 2**14, 2**15])
def test_hadamard(n):
    rows = randn(2, n)
    close(fast_cuda.hadamard(rows), hadamard(rows.T).T)
    assert torch.equal(fast_cuda.hadamard(rows.T.contiguous().T), fast_cuda.hadamard(rows))


@triton.jit
def _philox(words, seed, c0, c1, c2, c3):
    lane = tl.arange(0, 4)
    none = tl.zeros([4], tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        none + c0.to(tl.uint32),
        none + c1.to(tl.uint32),
        none + c2.to(tl.uint32),
        none + c3.to(tl.uint32),
    )
    word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    tl.store(words + lane, word.to(tl.int64))


# Random123, kat_vectors, philox4x32 10
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, (ONES, ONES), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter, key, answer):
    words = torch.empty(4, dtype=torch.int64, device=DEVICE)
    _philox[(1,)](words, fast_cuda._seed(key), *counter)
    assert words.tolist() == answer


@pytest.mark.parametrize("first", [0, 128, 2**36, 128 * (2**32 - 1)])
def test_signs_are_those_of_philox(first):
    packed = fast_cuda._flips(KEY, first, 70_000, DEVICE)
    bits = packed[:, None] >> torch.arange(32, device=DEVICE) & 1
    expected = philox.signs(KEY, first, 70_000, DEVICE)
    assert torch.equal(1 - 2 * bits.flatten()[:70_000], expected.int())


@pytest.mark.parametrize("size", [2, 4, 64, 128])
def test_permutations_are_those_of_philox(size):
    got = fast_cuda._permutations(KEY, 5, 40, size, DEVICE)
    assert torch.equal(got, philox.permutations(KEY, 5, 40, size, DEVICE).int())


@pytest.mark.parametrize(("p", "D"), [(18_000, 256), (3000, 64), (3, 1)])
def test_gains_are_those_of_the_operator(p, D):
    sketch = make_sketch("affd", p, D)
    for first, size, count in sketch.groups(2**20):
        gains = fast_cuda._drawn(sketch, first, size, count, DEVICE)[-1]
        leading, trailing = sketch.permutations(first, size, count, DEVICE)
        L, T = leading.shape[1], trailing.shape[1]
        place = leading[:, :, None] * T + trailing[:, None, :]
        expected = sketch.gains(first, size, count, DEVICE).reshape(count, -1)
        expected = expected.gather(1, place.flatten(1)).reshape(count, L, T).mT
        torch.testing.assert_close(gains[:, :T, :L], expected, rtol=1e-6, atol=1e-7)
        assert not gains[:, T:].any() and not gains[:, :, L:].any()


@triton.jit
def _split(x, parts, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    high, middle, low = fast_cuda._thirds(tl.load(x + place), tl.float32)
    tl.store(parts + place, high)
    tl.store(parts + SIZE + place, middle)
    tl.store(parts + 2 * SIZE + place, low)


def test_three_bfloat16_hold_a_float32_exactly():
    x = randn(4096) * 2.0 ** torch.linspace(-100, 120, 4096, device=DEVICE).round()
    parts = torch.empty(3, 4096, device=DEVICE)
    _split[(1,)](x, parts, SIZE=4096)
    assert torch.equal(parts.bfloat16().float(), parts)
    assert torch.equal(parts.double().sum(0), x.double())


@pytest.mark.parametrize("kind", [pytest.param(k, marks=gpu) for k in ("countsketch", "affd")])
def test_more_than_2_to_the_31_entries(kind):
    p, D = 2**25, 1024
    sketch, x = make_sketch(kind, p, D), torch.zeros(80, p, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = torch.arange(p, device=DEVICE) % 251
    assert torch.equal(sketch(x)[-1], sketch(x[-1]))
    y = randn(80, D)
    assert torch.equal(sketch.adjoint(y)[-1], sketch.adjoint(y[-1]))
