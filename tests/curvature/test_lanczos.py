"""The Krylov basis, and going on after a kill with the same bits."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dsel_assets.curvature import StateError, spectrum
from dsel_assets.curvature.lanczos import lanczos
from dsel_assets.sketching import make_sketch

DIM = 300
STEPS = 50


def matrix(values, seed=0):
    """A symmetric matrix of these eigenvalues in a random orthogonal basis."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return Q @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ Q.T


SPECTRA = {
    "outliers": np.concatenate([np.linspace(100, 13, 10), np.linspace(0, 0.4, DIM - 10)]),
    "decaying": 10.0 ** -np.linspace(0, 18, DIM),
    "multiple": np.repeat([1.0, 2.0, 3.0, 100.0], DIM // 4),
    "low rank": np.concatenate([np.linspace(1, 2, 40), np.zeros(DIM - 40)]),
    "zero": np.zeros(DIM),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_basis_is_orthonormal_and_tridiagonalises(name, dtype):
    """All of space, products of single precision too: no orthogonality is lost."""
    H = matrix(SPECTRA[name]).to(dtype)
    found = lanczos(lambda v: (H @ v.to(dtype)).double(), DIM, DIM)
    Q = found.basis
    assert (Q @ Q.T - torch.eye(DIM)).abs().max() < 1e-12
    T = np.diag(found.diagonal)
    T += np.diag(found.beside[:-1], 1) + np.diag(found.beside[:-1], -1)
    scale = max(1.0, SPECTRA[name].max())
    atol = scale * (1e-12 if dtype == torch.float64 else 1e-5)
    np.testing.assert_allclose((Q @ H.double() @ Q.T).numpy(), T, atol=atol)


@pytest.mark.parametrize("steps", [1, 2, 40, DIM])
def test_krylov_relation(steps):
    H = matrix(SPECTRA["outliers"])
    found = lanczos(lambda v: H @ v, DIM, steps)
    Q = found.basis
    left = H @ Q[-1] - found.diagonal[-1] * Q[-1]
    if steps > 1:
        left -= found.beside[-2] * Q[-2]
    assert left.norm().item() == pytest.approx(found.beside[-1], abs=1e-9)


def test_it_may_end_early():
    H = matrix(SPECTRA["outliers"])
    seen = []
    found = lanczos(
        lambda v: H @ v, DIM, STEPS, enough=lambda d, b: seen.append(len(d)) or len(d) >= 15
    )
    assert (
        seen == [5, 10, 15] and len(found.basis) == len(found.diagonal) == len(found.beside) == 15
    )


class KilledError(Exception):
    pass


def dying(H, calls):
    """The product with H, which fails after so many calls."""
    left = [calls]

    def product(v):
        left[0] -= 1
        if left[0] < 0:
            raise KilledError
        return H @ v

    return product


def same(a, b):
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("eigenvalues", "raw", "residuals", "nodes", "weights")
    ) and (a.trace, a.frobenius) == (b.trace, b.frobenius)


@pytest.mark.parametrize("name", ["outliers", "low rank", "zero"])
@pytest.mark.parametrize("calls", [0, 3, 11, 29, 45])
def test_resumed_is_undisturbed(tmp_path, name, calls):
    H = matrix(SPECTRA[name])
    options = {"k": 3, "iterations": STEPS, "probes": 1, "every": 7, "vectors": True}
    state = tmp_path / "deep" / "state.safetensors"
    with pytest.raises(KilledError):
        spectrum(dying(H, calls), DIM, state=state, **options)
    assert state.exists() == (calls > 7)
    again = []
    resumed = spectrum(lambda v: again.append(1) or H @ v, DIM, state=state, **options)
    plain = spectrum(lambda v: H @ v, DIM, **options)
    assert same(resumed, plain) and torch.equal(resumed.vectors, plain.vectors)
    saved = max(calls - 1, 0) // 7 * 7
    assert len(again) == 1 + STEPS - saved + (saved > 0)
    assert [path.name for path in state.parent.iterdir()] == [state.name]


def test_a_longer_or_shorter_run_goes_on_too(tmp_path):
    H = matrix(SPECTRA["outliers"])
    state = tmp_path / "state"
    spectrum(lambda v: H @ v, DIM, k=2, iterations=25, every=10, state=state)
    for iterations in (45, 12, 20, 21):
        found = spectrum(lambda v: H @ v, DIM, k=2, iterations=iterations, every=10, state=state)
        assert same(found, spectrum(lambda v: H @ v, DIM, k=2, iterations=iterations))
    assert len(spectrum(lambda v: H @ v, DIM, k=1, iterations=1, state=state).nodes) == 1


def test_with_a_sketch(tmp_path):
    H = matrix(SPECTRA["outliers"])
    S = make_sketch("countsketch", DIM, 64)
    options = {"k": 3, "sketch": S, "iterations": 30, "every": 5}
    plain = spectrum(lambda v: H @ v, **options)
    with pytest.raises(KilledError):
        spectrum(dying(H, 24), state=tmp_path / "state", **options)
    assert same(spectrum(lambda v: H @ v, state=tmp_path / "state", **options), plain)


SCRIPT = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
from test_lanczos import DIM, SPECTRA, matrix
from dsel_assets.curvature import spectrum

torch.set_num_threads(int(sys.argv[3]))
H, calls = matrix(SPECTRA["outliers"]), 0

def product(v):
    global calls
    calls += 1
    if calls > 31:
        os.kill(os.getpid(), signal.SIGKILL)
    return H @ v

spectrum(product, DIM, k=4, iterations=50, every=5, state=sys.argv[2])
"""


def test_killed_and_resumed(tmp_path):
    state = tmp_path / "state.safetensors"
    here = str(Path(__file__).parent)
    threads = str(torch.get_num_threads())
    killed = subprocess.run([sys.executable, "-c", SCRIPT, here, str(state), threads], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    known = load_file(state)
    assert known["diagonal"].shape == (20,) and known["basis"].shape == (21, DIM)
    H = matrix(SPECTRA["outliers"])
    resumed = spectrum(lambda v: H @ v, DIM, k=4, iterations=50, every=5, state=state)
    assert same(resumed, spectrum(lambda v: H @ v, DIM, k=4, iterations=50))


def test_another_runs_state_is_refused(tmp_path):
    H = matrix(SPECTRA["outliers"])
    state = tmp_path / "state"
    S, other = (make_sketch("countsketch", DIM, 64, seed=seed) for seed in (0, 1))
    options = {"k": 2, "iterations": 30}
    spectrum(lambda v: H @ v, DIM, state=state, **options)
    before = state.read_bytes()
    for match, change in {
        "seed": {"seed": 1},
        "dim, sketch": {"sketch": S},
    }.items():
        with pytest.raises(StateError, match=f"{match}; delete it"):
            spectrum(lambda v: H @ v, DIM, state=state, **options, **change)
    with pytest.raises(StateError, match="another operator; delete it"):
        spectrum(lambda v: 1.001 * (H @ v), DIM, state=state, **options)
    rotated = matrix(SPECTRA["outliers"], seed=1)
    with pytest.raises(StateError, match="another operator"):
        spectrum(lambda v: rotated @ v, DIM, state=state, **options)
    assert state.read_bytes() == before

    state.unlink()
    spectrum(lambda v: H @ v, sketch=S, state=state, **options)
    with pytest.raises(StateError, match="differs in sketch;"):
        spectrum(lambda v: H @ v, sketch=other, state=state, **options)


def test_a_damaged_state_is_refused(tmp_path):
    H = matrix(SPECTRA["outliers"])
    state = tmp_path / "state"
    spectrum(lambda v: H @ v, DIM, k=2, iterations=30, state=state)
    whole, made_of = state.read_bytes(), {"version": 1, "dim": DIM, "seed": 0, "sketch": None}
    for damaged in (b"", whole[:40], whole[:-100], b"x" * 100):
        state.write_bytes(damaged)
        with pytest.raises(StateError, match="cannot be read"):
            spectrum(lambda v: H @ v, DIM, k=2, iterations=30, state=state)
    for metadata in ({}, {"made_of": "?"}, {"made_of": json.dumps(made_of)}):
        save_file({"a": torch.zeros(1)}, state, metadata=metadata)
        with pytest.raises(StateError, match="cannot be read"):
            spectrum(lambda v: H @ v, DIM, k=2, iterations=30, state=state)
