"""Hessian-vector products against the dense Hessian."""

import pytest
import torch
from torch.func import functional_call, hessian
from torch.nn import functional

from dsel_assets.curvature import hessian_vector_product, spectrum


def problem(dtype=torch.float64):
    """A small convolutional net, its loss on 20 examples, and the dense Hessian [p, p]."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3),
        torch.nn.Tanh(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(12, 10),
        torch.nn.GELU(),
        torch.nn.Linear(10, 4),
    ).to(dtype)
    x, y = torch.randn(20, 1, 6, 6, dtype=dtype), torch.randint(4, (20,))
    parameters = dict(net.named_parameters())

    def loss(values):
        return functional.cross_entropy(functional_call(net, values, x), y)

    blocks = hessian(loss)({name: p.detach() for name, p in parameters.items()})
    dense = torch.cat(
        [
            torch.cat([blocks[a][b].reshape(parameters[a].numel(), -1) for b in parameters], 1)
            for a in parameters
        ]
    )
    return loss, parameters, dense


def test_is_the_dense_hessian():
    loss, parameters, dense = problem()
    product = hessian_vector_product(loss, parameters)
    p = len(dense)
    assert 180 < p < 240
    v = torch.randn(5, p, dtype=torch.float64)
    torch.testing.assert_close(torch.stack([product(row) for row in v]), v @ dense)
    with pytest.raises(ValueError, match=f"{p} parameters"):
        product(v[0, 1:])


def test_single_precision_parameters_take_double_vectors():
    loss, parameters, dense = problem(torch.float32)
    v = torch.randn(len(dense), dtype=torch.float64)
    product = hessian_vector_product(loss, parameters)(v)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, dense @ v.float(), rtol=1e-4, atol=1e-5)


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
    for _ in range(2):
        torch.testing.assert_close(product(v), 6 * w.flatten() * v)


def test_an_error_of_the_loss_is_not_hidden():
    def loss(parameters):
        raise NotImplementedError("this loss")

    with pytest.raises(NotImplementedError, match="this loss"):
        hessian_vector_product(loss, {"w": torch.ones(2)})(torch.ones(2))


def test_spectrum_of_a_net():
    loss, parameters, dense = problem()
    exact = torch.linalg.eigvalsh(dense).numpy()
    found = spectrum(hessian_vector_product(loss, parameters), len(dense), k=8)
    for value in found.eigenvalues:
        assert abs(exact - value).min() < 1e-6
    assert abs(found.eigenvalues[0] - exact[-1]) < 1e-6
    assert abs(found.eigenvalues[-1] - exact[0]) < 1e-6
    assert found.residuals.max() < 1e-4
