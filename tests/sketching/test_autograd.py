"""Sketches inside autograd and torch.func: implicit and explicit derivatives are equal."""

import pytest
import torch
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.functional import cross_entropy

from dsel_assets.sketching import ModelSketch, make_sketch


@pytest.fixture(scope="module")
def model():
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    ).double()
    for parameter in net.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def problem(model):
    """The loss as a function of named parameters, the parameters."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    labels = torch.arange(8) % 3
    return (
        lambda theta: cross_entropy(functional_call(model, theta, (x,)), labels),
        dict(model.named_parameters()),
    )


def moved(theta, direction):
    return {name: t + direction[name][0] for name, t in theta.items()}


def model_sketch(make, theta, D=10):
    shapes = {name: t.shape for name, t in theta.items()}
    return ModelSketch(shapes, make.kind, D, 0, **make.options)


def test_implicit_and_explicit_gradients_are_equal(make, problem):
    loss, theta = problem
    sketch = model_sketch(make, theta)

    def at(w):
        return loss(moved(theta, sketch.adjoint(w[None])))

    explicit = sketch({name: g[None] for name, g in grad(loss)(theta).items()})[0]
    zero = torch.zeros(10, dtype=torch.float64)
    torch.testing.assert_close(grad(at)(zero), explicit, rtol=1e-10, atol=1e-12)
    w = zero.requires_grad_()
    at(w).backward()
    torch.testing.assert_close(w.grad, explicit, rtol=1e-10, atol=1e-12)


def test_implicit_and_explicit_hessian_products_are_equal(make, problem):
    loss, theta = problem
    sketch = model_sketch(make, theta)
    v = torch.randn(10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def at(w):
        return loss(moved(theta, sketch.adjoint(w[None])))

    direction = {name: t[0] for name, t in sketch.adjoint(v[None]).items()}
    product = jvp(grad(loss), (theta,), (direction,))[1]
    explicit = sketch({name: t[None] for name, t in product.items()})[0]
    zero = torch.zeros_like(v)
    implicit = jvp(grad(at), (zero,), (v,))[1]
    torch.testing.assert_close(implicit, explicit, rtol=1e-10, atol=1e-12)
    reverse = vjp(grad(at), zero)[1](v)[0]
    torch.testing.assert_close(reverse, explicit, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["countsketch", "affd", "srht"])
@pytest.mark.parametrize("direction", ["forward", "adjoint"])
def test_derivatives_by_finite_differences(kind, direction):
    """Of the one function that all kinds share, with and without a `finish`."""
    sketch = make_sketch(kind, 13, 6)
    apply, size = (sketch, 13) if direction == "forward" else (sketch.adjoint, 6)
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(apply, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: apply(x).square(), x)


def test_vmap_and_jacobians(make):
    sketch = make(20, 7)
    x = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = sketch(x)
    assert torch.equal(vmap(sketch)(x), expected)
    assert torch.equal(vmap(sketch, in_dims=1, out_dims=1)(x), expected)
    assert torch.equal(vmap(vmap(sketch))(x), expected)
    assert torch.equal(vmap(sketch.adjoint)(expected), sketch.adjoint(expected))
    S = sketch(torch.eye(20, dtype=torch.float64)).T
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(sketch)(x[0, 0]), S)


def test_gradients_have_the_dtype_of_the_input(make):
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.ones(2, 20, dtype=dtype, requires_grad=True)
        make(20, 7)(x).sum().backward()
        assert x.grad.dtype == dtype and x.grad.isfinite().all()
