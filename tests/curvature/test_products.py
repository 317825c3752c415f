"""Products with the Hessian and its Gauss-Newton part, against the dense matrices."""

import numpy as np
import pytest
import torch
from scipy.sparse import linalg
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

from dsel_assets.curvature import (
    averaged,
    gauss_newton_vector_product,
    hessian_vector_product,
    spectrum,
)


class Problem:
    """A small convolutional net, its loss on 20 examples, and the dense matrices [p, p]."""

    def __init__(self, dtype=torch.float64):
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 3, 3),
            torch.nn.Tanh(),
            torch.nn.MaxPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Linear(12, 10),
            torch.nn.GELU(),
            torch.nn.Linear(10, 4),
        ).to(dtype)
        self.x, self.y = torch.randn(20, 1, 6, 6, dtype=dtype), torch.randint(4, (20,))
        self.parameters = dict(self.net.named_parameters())
        self.size = sum(tensor.numel() for tensor in self.parameters.values())

    def logits(self, values, rows=slice(None)):
        return functional_call(self.net, values, self.x[rows])

    def loss(self, values, rows=slice(None)):
        return F.cross_entropy(self.logits(values, rows), self.y[rows])

    def detached(self):
        return {name: tensor.detach() for name, tensor in self.parameters.items()}

    def hessian(self):
        blocks = hessian(self.loss)(self.detached())
        return torch.cat(
            [
                torch.cat([blocks[a][b].reshape(self.parameters[a].numel(), -1) for b in blocks], 1)
                for a in blocks
            ]
        )

    def gauss_newton(self):
        jacobian = jacrev(self.logits)(self.detached())
        J = torch.cat([part.flatten(2) for part in jacobian.values()], 2)  # [n, C, p]
        probabilities = self.logits(self.detached()).softmax(1)
        H = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None]
        return torch.einsum("ncp,ncd,ndq->pq", J, H, J) / len(J)

    def vectors(self, n=5, dtype=torch.float64):
        return torch.randn(n, self.size, dtype=dtype, generator=torch.Generator().manual_seed(1))

    def by_name(self, v):
        parts = v.split([tensor.numel() for tensor in self.parameters.values()])
        return {
            name: part.reshape(tensor.shape)
            for part, (name, tensor) in zip(parts, self.parameters.items(), strict=True)
        }


def products(problem, **options):
    def output_loss(logits):
        return F.cross_entropy(logits, problem.y)

    return {
        "hessian": hessian_vector_product(problem.loss, problem.parameters, **options),
        "gauss_newton": gauss_newton_vector_product(
            problem.logits, problem.parameters, output_loss, **options
        ),
    }


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_is_the_dense_matrix(matrix, keep):
    problem = Problem()
    assert 180 < problem.size < 240
    dense, v = getattr(problem, matrix)(), problem.vectors()
    product = products(problem, keep=keep)[matrix]
    for _ in range(2):
        found = torch.stack([product(row) for row in v])
        torch.testing.assert_close(found, v @ dense)
    assert not found.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(product(v[0]), found[0])
    with torch.inference_mode():
        torch.testing.assert_close(product(v[0]), found[0])


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_vectors_by_name(matrix):
    problem = Problem()
    product = products(problem)[matrix]
    v = problem.vectors()[0]
    named = problem.by_name(v)
    shuffled = dict(reversed(named.items()))
    for given in (named, shuffled):
        answer = product(given)
        assert list(answer) == list(problem.parameters)
        flat = torch.cat([tensor.flatten() for tensor in answer.values()])
        torch.testing.assert_close(flat, product(v))
    del named["0.bias"]
    with pytest.raises(ValueError, match=r"0\.bias"):
        product(named)
    for bad in (v[1:], v[None], v[:0]):
        with pytest.raises(ValueError, match=f"{problem.size} parameters"):
            product(bad)


def test_gauss_newton_is_positive_semidefinite_and_the_hessian_of_a_linear_model():
    problem = Problem()
    v = problem.vectors(40)
    product = products(problem)["gauss_newton"]
    assert min(torch.dot(row, product(row)) for row in v) >= 0
    values = torch.linalg.eigvalsh(problem.gauss_newton())
    assert torch.linalg.eigvalsh(problem.hessian())[0] < -1e-3 < values[0]

    x, labels = torch.randn(30, 5, dtype=torch.float64), torch.randint(3, (30,))
    weights = {"w": torch.randn(5, 3, dtype=torch.float64)}
    whole = hessian_vector_product(lambda p: F.cross_entropy(x @ p["w"], labels), weights)
    part = gauss_newton_vector_product(
        lambda p: x @ p["w"], weights, lambda logits: F.cross_entropy(logits, labels)
    )
    v = torch.randn(15, dtype=torch.float64)
    torch.testing.assert_close(whole(v), part(v))


def test_gauss_newton_of_another_loss_and_output_shape():
    """Squared error: J'J, times 2 / number of outputs; tokens stand in a dimension of their own."""
    x, goal = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(4, 3, 2, dtype=torch.float64)
    weights = {"w": torch.randn(5, 2, dtype=torch.float64)}
    product = gauss_newton_vector_product(
        lambda p: (x @ p["w"]).tanh(), weights, lambda out: F.mse_loss(out, goal)
    )
    J = jacrev(lambda w: (x @ w).tanh())(weights["w"]).reshape(24, 10)
    v = torch.randn(10, dtype=torch.float64)
    torch.testing.assert_close(product(v), J.T @ (J @ v) * 2 / 24)


@pytest.mark.parametrize("keep", [True, False])
def test_batches_average_to_the_whole(keep):
    problem = Problem()
    batches = [slice(0, 3), slice(3, 10), slice(10, 20)]
    parts = [
        hessian_vector_product(
            lambda p, rows=rows: problem.loss(p, rows), problem.parameters, keep=keep
        )
        for rows in batches
    ]
    whole = products(problem)["hessian"]
    mean = averaged(parts, [3, 7, 10])
    v = problem.vectors()[0]
    torch.testing.assert_close(mean(v), whole(v))
    named = mean(problem.by_name(v))
    torch.testing.assert_close(torch.cat([t.flatten() for t in named.values()]), whole(v))
    torch.testing.assert_close(averaged(parts[:1])(v), parts[0](v))
    torch.testing.assert_close(averaged(parts)(v), sum(part(v) for part in parts) / 3)
    for weights in ([1, 2], [1, 2, -1], [0, 0, 0], [1, 1, float("nan")]):
        with pytest.raises(ValueError, match="3 products"):
            averaged(parts, weights)
    with pytest.raises(ValueError, match="0 products"):
        averaged([])


def test_single_precision_parameters_take_double_vectors():
    problem = Problem(torch.float32)
    v = problem.vectors()[0]
    for name, product in products(problem).items():
        found = product(v)
        assert found.dtype == torch.float32
        dense = getattr(problem, name)()
        torch.testing.assert_close(found, dense @ v.float(), rtol=1e-4, atol=1e-5)


def test_training_may_go_on():
    """A kept record stays at the point where it was made; without one, the point moves along."""
    problem = Problem()
    kept, anew = (products(problem, keep=keep)["hessian"] for keep in (True, False))
    v = problem.vectors()[0]
    before = kept(v)
    with torch.no_grad():
        problem.parameters["6.weight"].mul_(2)
    torch.testing.assert_close(kept(v), before)
    torch.testing.assert_close(anew(v), products(problem)["hessian"](v))
    assert (anew(v) - before).norm() > 0.1 * before.norm()
    assert all(tensor.grad is None for tensor in problem.parameters.values())


class Cube(torch.autograd.Function):
    """Differentiable backwards, twice, and not forwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3 * ctx.saved_tensors[0] ** 2


def test_without_forward_mode():
    w = torch.randn(4, 3, dtype=torch.float64)
    product = hessian_vector_product(lambda p: Cube.apply(p["w"]).sum(), {"w": w})
    v = torch.randn(12, dtype=torch.float64)
    torch.testing.assert_close(product(v), 6 * w.flatten() * v)
    curve = gauss_newton_vector_product(
        lambda p: Cube.apply(p["w"]), {"w": w}, lambda out: out.square().sum() / 2
    )
    torch.testing.assert_close(curve(v), 9 * w.flatten() ** 4 * v)


def test_an_error_of_the_loss_is_not_hidden():
    def loss(parameters):
        raise NotImplementedError("this loss")

    with pytest.raises(NotImplementedError, match="this loss"):
        hessian_vector_product(loss, {"w": torch.ones(2)})(torch.ones(2))


def test_spectrum_of_a_net():
    problem = Problem()
    for name, product in products(problem).items():
        exact = torch.linalg.eigvalsh(getattr(problem, name)()).numpy()
        found = spectrum(product, problem.size, k=8)
        assert np.abs(exact[:, None] - found.eigenvalues).min(0).max() < 1e-6
        assert abs(found.eigenvalues[0] - exact[-1]) < 1e-6
        if name == "hessian":
            assert abs(found.eigenvalues[-1] - exact[0]) < 1e-6
            assert found.residuals.max() < 1e-4


def test_agrees_with_eigsh_and_curvlinops():
    """Top five of the Hessian to 1e-3, float32 products."""
    problem = Problem(torch.float32)
    product = products(problem)["hessian"]
    found = spectrum(product, problem.size, k=6, tolerance=1e-4).eigenvalues[:5]
    H = linalg.LinearOperator(
        (problem.size,) * 2, lambda v: product(torch.from_numpy(v.ravel())).numpy(), dtype="f4"
    )
    values = linalg.eigsh(H, 5, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(found, np.sort(values)[::-1], rtol=1e-3)

    peer = pytest.importorskip("curvlinops")
    H = peer.HessianLinearOperator(
        problem.net,
        torch.nn.CrossEntropyLoss(),
        list(problem.parameters.values()),
        [(problem.x, problem.y)],
    )
    values = linalg.eigsh(H.to_scipy(), 5, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(found, np.sort(values)[::-1], rtol=1e-3)
