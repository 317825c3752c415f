"""The compiled kernels against plain torch, and what they may use of threads and memory."""

import subprocess
import sys
import textwrap
import time

import pytest
import torch

from dsel_assets.sketching import make_sketch
from dsel_assets.sketching.fast import plain_torch

SIZES = [
    (1, 1),
    (3, 2),
    (5, 8),
    (64, 64),
    (100, 7),
    (3000, 1024),
    (20_000, 33),
    (40_001, 256),
    (90_000, 5000),
]
compiled = pytest.mark.parametrize("kind", ["countsketch", "affd"])


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@compiled
@pytest.mark.parametrize(("p", "D"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_equal_to_plain_torch(kind, p, D, dtype, tolerance):
    sketch = make_sketch(kind, p, D, seed=2, name="w")
    x, y = randn(3, p, dtype=dtype), randn(3, D, dtype=dtype, seed=1)
    with plain_torch():
        expected, back = sketch(x), sketch.adjoint(y)
    scale = tolerance * expected.abs().max().item()
    torch.testing.assert_close(sketch(x), expected, rtol=tolerance, atol=scale)
    scale = tolerance * back.abs().max().item()
    torch.testing.assert_close(sketch.adjoint(y), back, rtol=tolerance, atol=scale)


@compiled
def test_bits_do_not_depend_on_pieces(kind, monkeypatch):
    from dsel_assets.sketching import fast_cpu

    sketch, x = make_sketch(kind, 200_000, 1000), randn(2, 200_000)
    whole, back = sketch(x), sketch.adjoint(randn(2, 1000))
    monkeypatch.setattr(fast_cpu, "_PIECE", 2**15)
    assert torch.equal(sketch(x), whole)
    assert torch.equal(sketch.adjoint(randn(2, 1000)), back)


@compiled
@pytest.mark.parametrize("layout", ["transposed", "gaps", "reversed"])
def test_any_layout(kind, layout):
    sketch, x = make_sketch(kind, 5000, 64), randn(6, 5000)
    laid = {
        "transposed": x.T.contiguous().T,
        "gaps": torch.cat([x, x], dim=1)[:, :5000],
        "reversed": torch.cat([x, x])[:6],
    }[layout]
    assert torch.equal(sketch(laid), sketch(x))


@compiled
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's peak memory")
def test_memory_is_the_output_and_little_more(kind):
    code = f"""
        import resource, torch
        from dsel_assets.sketching import make_sketch
        torch.set_num_threads(2)
        sketch = make_sketch({kind!r}, 10**6, 1024)
        sketch(torch.ones(2, 10**6))  # compiled or loaded
        x = torch.ones(200, 10**6)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sketch(x)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    ).stdout
    assert float(output) <= 64 + 200 * 1024 * 4 / 2**20


@pytest.mark.parametrize(("kind", "most"), [("countsketch", 15), ("affd", 80)])
def test_time_is_a_small_multiple_of_reading_the_input(kind, most):
    """Loose, for a busy machine; benchmarks/sketching.py measures. Plain torch takes hundreds."""
    x, sketch = torch.ones(64, 10**6), make_sketch(kind, 10**6, 4096)
    sketch(x[:2])  # compiled or loaded

    def seconds(work):
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    assert min(seconds(lambda: sketch(x)) / seconds(x.sum) for _ in range(5)) < most
