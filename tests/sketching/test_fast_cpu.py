"""The compiled kernels against plain torch, and what they may use of threads and memory."""

import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from dsel_assets.sketching import KINDS, make_sketch
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
@pytest.mark.parametrize("layout", ["transposed", "gaps", "slice", "expanded"])
def test_any_layout(kind, layout):
    sketch, x = make_sketch(kind, 5000, 64), randn(6, 5000)
    laid = {
        "transposed": x.T.contiguous().T,
        "gaps": torch.cat([x, x], dim=1)[:, :5000],
        "slice": torch.cat([x, x])[3:9].roll(3, 0),
        "expanded": x[:1].expand(6, -1),
    }[layout]
    x = laid.clone()
    assert torch.equal(sketch(laid), sketch(x))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@compiled
def test_autograd_passes_through_in_several_threads(kind, two_threads):
    """Other threads do not know that this one computes without gradients."""
    sketch, x, y = make_sketch(kind, 300, 16), randn(4, 300), randn(4, 16, seed=1)
    (gradient,) = torch.autograd.grad((sketch(x.requires_grad_()) * y).sum(), x)
    torch.testing.assert_close(gradient, sketch.adjoint(y))
    (gradient,) = torch.autograd.grad((sketch.adjoint(y.requires_grad_()) * x).sum(), y)
    torch.testing.assert_close(gradient, sketch(x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_does_not_depend_on_torchs_defaults(kind):
    x = randn(2, 3000)
    expected = make_sketch(kind, 3000, 40)(x)
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(make_sketch(kind, 3000, 40)(x), expected)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("meta")
        assert torch.equal(make_sketch(kind, 3000, 40)(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_where_no_cache_can_be_written_the_kernels_are_compiled_all_the_same(tmp_path):
    import dsel_assets

    package = Path(dsel_assets.__file__).parent
    shutil.copytree(package, tmp_path / "dsel_assets", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "nowhere").write_text("a file where numba would make a folder")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        sys.dont_write_bytecode = True
        import numba.core.caching as caching
        caching.CacheImpl._locator_classes = []
        import torch
        from dsel_assets.sketching import KINDS, make_sketch
        print(make_sketch("countsketch", 100, 8)(torch.ones(100)).square().sum().item() >= 0)
    """
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "True"


@compiled
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's peak memory")
@pytest.mark.parametrize("layout", ["", ".T.contiguous().T", ".bfloat16()"])
def test_memory_is_the_output_and_little_more(kind, layout):
    code = f"""
        import resource, torch
        from dsel_assets.sketching import KINDS, make_sketch
        torch.set_num_threads(2)
        sketch = make_sketch({kind!r}, 10**6, 1024)
        sketch(torch.ones(2, 10**6))  # compiled or loaded
        x = torch.ones(200, 10**6){layout}
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
