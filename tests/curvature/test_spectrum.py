"""Eigenvalues and moments of operators whose spectrum is known, exactly and through sketches."""

import numpy as np
import pytest
import torch

from dsel_assets.curvature import (
    hessian_vector_product,
    negative_ratio,
    sketched_operator,
    spectrum,
    suggest_dimension,
)
from dsel_assets.sketching import ModelSketch, make_sketch
from dsel_assets.sketching.hadamard import hadamard

DIM = 600
TOP = np.linspace(100, 13, 10)
NEGATIVE = np.array([-8.0, -12.0, -30.0])
VALUES = np.concatenate([TOP, NEGATIVE, np.linspace(0, 0.4, DIM - 13)])


def operator(values, seed=0):
    """The product with a symmetric matrix of these eigenvalues in a random orthogonal basis."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    H = Q @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ Q.T
    return lambda v: H @ v


def test_known_spectrum():
    found = spectrum(operator(VALUES), DIM, k=13)
    np.testing.assert_allclose(found.eigenvalues, [*TOP, *NEGATIVE], atol=1e-6)
    assert found.residuals.max() < 1e-6
    assert (found.eigenvalues == found.raw).all()


def test_both_ends_are_kept():
    both = spectrum(operator(VALUES), DIM, k=3).eigenvalues
    np.testing.assert_allclose(both, [100, TOP[1], -30], atol=1e-6)
    both = spectrum(operator(-VALUES), DIM, k=3).eigenvalues
    np.testing.assert_allclose(both, [30, -TOP[1], -100], atol=1e-6)
    assert spectrum(operator(-VALUES), DIM, k=1).eigenvalues == pytest.approx([-100])


def test_residuals_bound_the_error():
    found = spectrum(operator(VALUES), DIM, k=5, iterations=14)
    error = np.abs(found.raw[:, None] - VALUES).min(axis=1)
    assert (error <= found.residuals + 1e-9).all()
    assert found.residuals.max() > 1e-3


@pytest.mark.parametrize(
    "values",
    [
        [0.0] * 20,
        [3.0] * 20,
        [5.0, 5.0, 5.0, -2.0] + [1.0] * 16,
        [7.0] + [0.0] * 19,
        [4.0],
        list(np.linspace(-1, 2, 20)),
    ],
)
def test_invariant_subspaces_and_whole_spaces(values):
    n = len(values)
    found = spectrum(operator(values), n, k=n, iterations=n)
    np.testing.assert_allclose(found.eigenvalues, sorted(values, reverse=True), atol=1e-10)
    assert found.weights.sum() == pytest.approx(1)


def test_trace_and_frobenius_norm():
    estimates = [spectrum(operator(VALUES), DIM, k=1, iterations=1, seed=s) for s in range(60)]
    for exact, drawn in [
        (VALUES.sum(), [e.trace for e in estimates]),
        ((VALUES**2).sum(), [e.frobenius**2 for e in estimates]),
    ]:
        assert abs(np.mean(drawn) - exact) < 4 * np.std(drawn) / len(drawn) ** 0.5
    # Var z'Hz = 2 (|H|_F^2 - sum of squares of the diagonal), over 8 probes
    assert np.std([e.trace for e in estimates]) < 1.5 * (2 * (VALUES**2).sum() / 8) ** 0.5
    diagonal = spectrum(lambda v: torch.as_tensor(VALUES) * v, DIM, k=1, iterations=1, probes=1)
    assert diagonal.trace == pytest.approx(VALUES.sum())
    assert diagonal.frobenius == pytest.approx((VALUES**2).sum() ** 0.5)


def test_seed_decides():
    first, again, other = (spectrum(operator(VALUES), DIM, k=2, seed=s) for s in (1, 1, 2))
    assert first.trace == again.trace and (first.nodes == again.nodes).all()
    assert first.trace != other.trace


def test_eigenvectors():
    found = spectrum(operator(VALUES), DIM, k=13, vectors=True)
    U = found.vectors
    assert U.shape == (13, DIM) and U.dtype == torch.float64
    torch.testing.assert_close(U @ U.T, torch.eye(13, dtype=torch.float64))
    H = operator(VALUES)
    for value, residual, u in zip(found.raw, found.residuals, U, strict=True):
        assert (H(u) - value * u).norm() <= residual + 1e-9
    assert spectrum(H, DIM, k=1).vectors is None


def test_tolerance_ends_it_early():
    calls = []
    product = operator(VALUES)

    def counted(v):
        calls.append(1)
        return product(v)

    options = {"k": 5, "iterations": 200, "probes": 1}
    whole = spectrum(counted, DIM, **options)
    assert len(calls) == 201
    before = 200
    for tolerance in (1e-9, 1e-2):
        calls.clear()
        found = spectrum(counted, DIM, tolerance=tolerance, **options)
        assert found.residuals.max() <= tolerance * 100
        assert len(calls) < before and len(found.nodes) == len(calls) - 1
        before = len(calls)
        np.testing.assert_allclose(found.eigenvalues, whole.eigenvalues, atol=tolerance * 100)
    calls.clear()
    never = spectrum(counted, DIM, tolerance=0.0, **options | {"iterations": 20})
    assert len(calls) == 21 and never.residuals.max() > 0


def test_refusals():
    for bad in (
        {"k": 0},
        {"k": 11},
        {"k": 2, "iterations": 1},
        {"k": 1, "iterations": 11},
        {"k": 1, "probes": 0},
        {"k": 1, "every": 0},
    ):
        with pytest.raises(ValueError, match="iterations <= 10"):
            spectrum(lambda v: v, 10, **bad)
    with pytest.raises(ValueError, match="not finite"):
        spectrum(lambda v: v * float("nan"), 10, k=1)
    for wrong in (lambda v: v[:3], lambda v: v[:, None]):
        with pytest.raises(ValueError, match=r"product with \(10,\) has shape"):
            spectrum(wrong, 10, k=1)
    with pytest.raises(ValueError, match="dim must be given"):
        spectrum(lambda v: v, k=1)
    S = make_sketch("countsketch", 10, 4)
    with pytest.raises(ValueError, match="reads 10 parameters, dim is 11"):
        spectrum(lambda v: v, 11, k=1, sketch=S)
    with pytest.raises(ValueError, match="iterations <= 4"):
        spectrum(lambda v: v, 10, k=5, sketch=S)


# Outliers with the sum that the note's traces speak of.
OUTLIERS = np.array([100.0, 70, 50, 40, 30, 25, 20, 18, 15, 13])


def bulky(p, width, seed):
    """(product, eigenvalues) of a quadratic in a random sign-Hadamard basis: ten outliers, three
    negatives and a bulk that is uniform on 0 .. width.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(p, generator=generator, dtype=torch.float64) * width
    values[:10], values[10:13] = torch.as_tensor(OUTLIERS), torch.as_tensor([-30.0, -12, -8])
    values = values[torch.randperm(p, generator=generator)]
    flips = (torch.randint(2, (p,), generator=generator) * 2 - 1).double()
    return lambda v: flips * hadamard(values * hadamard(flips * v)) / p, values


def relative_error(found):
    return np.mean(np.abs(found[:10] - OUTLIERS) / OUTLIERS)


@pytest.mark.parametrize("kind", ["affd", "countsketch"])
def test_the_bias_of_a_sketch_is_removed(kind):
    """The note's quadratic, PSD bulk of trace 13,455 in 2^16 dimensions, seen through D = 2^10."""
    p, D, raw, corrected = 2**16, 2**10, [], []
    for seed in range(4):
        H, values = bulky(p, 0.4, seed)
        S = make_sketch(kind, p, D, seed=seed)
        found = spectrum(H, p, k=13, sketch=S, iterations=80)
        raw.append(relative_error(found.raw))
        corrected.append(relative_error(found.eigenvalues))
        noise = values.norm().item() / D**0.5
        # all k are corrected, by (tr - the kept) / D
        bias = (found.trace - found.eigenvalues.sum()) / D
        np.testing.assert_allclose(found.raw - found.eigenvalues, bias)
        assert bias == pytest.approx((values.sum().item() - OUTLIERS.sum() + 50) / D, rel=0.1)
        assert np.abs(found.eigenvalues[:10] - OUTLIERS).max() < 3 * noise
        assert abs(found.eigenvalues[-1] + 30) < 3 * noise > abs(found.eigenvalues[-2] + 12)
        assert abs(negative_ratio(found.eigenvalues) - 0.3) < 0.1 < 0.3 - negative_ratio(found.raw)
        assert found.dim == p and 0.4 < found.frobenius / values.norm().item() < 1.6
        assert suggest_dimension(found, 1e-9) == p
    assert 0.4 < np.mean(raw) < 0.65
    assert np.mean(corrected) <= 0.05


def test_negative_eigenvalues_that_the_bias_hides():
    """At raw values near 0 they are still the farthest from the bulk, hence among the k."""
    values = torch.rand(2**14, generator=torch.Generator().manual_seed(0)).double() * 0.4
    bias = values.sum().item() / 256
    values[:3] = -bias + torch.tensor([0.0, 1.0, -1.0])
    S = make_sketch("countsketch", 2**14, 256)
    found = spectrum(lambda v: values * v, sketch=S, k=16, iterations=80)
    assert abs(found.raw[-3:]).max() < bias / 2 < 0.7 * abs(found.eigenvalues[-3:]).min()


@pytest.mark.parametrize("kind", ["affd", "countsketch"])
def test_without_a_bulk_there_is_little_to_correct(kind):
    H, _ = bulky(2**14, 0.0, 0)
    found = spectrum(H, k=13, sketch=make_sketch(kind, 2**14, 2**10), iterations=40)
    assert np.abs(found.raw - found.eigenvalues).max() < 1
    assert relative_error(found.eigenvalues) < 0.2


def test_no_orthogonality_is_lost_in_the_sketch():
    """Float32 products: the Krylov vectors are double all the same."""
    H, _ = bulky(2**12, 0.4, 0)
    found = spectrum(
        lambda v: H(v).float(),
        sketch=make_sketch("affd", 2**12, 512),
        k=200,
        iterations=200,
        vectors=True,
    )
    U = found.vectors
    assert U.dtype == torch.float64
    assert (U @ U.T - torch.eye(200)).abs().max() < 1e-10


class Model:
    """A loss with parameters of two shapes, and its dense Hessian."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.parameters = {
            "a": torch.randn(6, 5, generator=generator, dtype=torch.float64),
            "b": torch.randn(7, generator=generator, dtype=torch.float64),
        }
        self.mix = torch.randn(40, 37, generator=generator, dtype=torch.float64)
        self.product = hessian_vector_product(self.loss, self.parameters)
        eye = torch.eye(37, dtype=torch.float64)
        self.hessian = torch.stack([self.product(row) for row in eye])

    def loss(self, parameters):
        flat = torch.cat([tensor.flatten() for tensor in parameters.values()])
        return (self.mix @ flat).sin().sum()

    def sketch(self, kind, D):
        return ModelSketch({k: t.shape for k, t in self.parameters.items()}, kind, D)


@pytest.mark.parametrize("kind", ["affd", "countsketch", "gaussian"])
def test_sketched_operator_is_s_h_s_transposed(kind):
    model = Model()
    D, eye = 16, torch.eye(37, dtype=torch.float64)
    v = torch.randn(D, dtype=torch.float64)

    S = make_sketch(kind, 37, D)
    columns = S(eye)
    seen = sketched_operator(model.product, S)(v)
    torch.testing.assert_close(seen, columns.T @ model.hessian @ columns @ v)

    S = model.sketch(kind, D)
    columns = S({"a": eye[:, :30].reshape(37, 6, 5), "b": eye[:, 30:]})
    product = sketched_operator(model.product, S)
    torch.testing.assert_close(product(v), columns.T @ model.hessian @ columns @ v)
    assert product(v).dtype == torch.float64
    found = spectrum(model.product, 37, k=D // 2, iterations=D, sketch=S)
    exact = torch.linalg.eigvalsh(columns.T @ model.hessian @ columns)
    np.testing.assert_allclose(found.nodes, exact, atol=1e-8)
    with pytest.raises(ValueError, match="at most half, got 9"):
        spectrum(model.product, 37, k=9, iterations=D, sketch=S)
    assert found.dim == 37 and len(found.nodes) == D


def test_a_model_sketch_asks_for_no_flat_vector():
    model = Model()

    def by_name(v):
        assert {name: tuple(t.shape) for name, t in v.items()} == {"a": (6, 5), "b": (7,)}
        return {name: 2 * tensor for name, tensor in v.items()}

    found = spectrum(by_name, k=1, sketch=model.sketch("countsketch", 8))
    assert found.trace == pytest.approx(2 * 37, rel=0.5)


def test_implicit_and_explicit_products_agree():
    """The Hessian of w -> loss(theta + S'w) at 0 is S H S'."""
    model = Model()
    S = model.sketch("affd", 16)

    def loss(w):
        moved = S.adjoint(w["w"][None])
        return model.loss({k: t + moved[k][0] for k, t in model.parameters.items()})

    implicit = hessian_vector_product(loss, {"w": torch.zeros(16, dtype=torch.float64)})
    v = torch.randn(16, dtype=torch.float64)
    torch.testing.assert_close(implicit(v), sketched_operator(model.product, S)(v))
