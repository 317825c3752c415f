"""Products of a loss's Hessian, or of its Gauss-Newton part, with vectors; no matrix is formed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.func import grad, vjp

V = TypeVar("V", Tensor, dict[str, Tensor])
Tensors = dict[str, Tensor]
Linear = Callable[[Tensors], Tensors]


class Product(Protocol):
    """A linear map of parameter space, v -> A v.

    v: flat [p], the tensors in the order of the parameters, or {name: [*shape]}, in which case no
    flat vector is made. The answer has the same form. Any real dtype goes in, the parameters' own
    comes out. Raises ValueError if v does not fit the parameters.
    """

    def __call__(self, v: V, /) -> V:
        """A v."""
        ...


def hessian_vector_product(
    loss: Callable[[Tensors], Tensor], parameters: Mapping[str, Tensor], *, keep: bool = True
) -> Product:
    """The map v -> H v, H the Hessian of `loss` at `parameters`.

    loss: maps parameters by name to a scalar, and computes by torch functions that can be
    differentiated twice.
    keep: record the gradient's computation once and go back through it at every product, two
    gradients' time each; the record takes several times a backward pass's memory and a copy of the
    parameters. Otherwise it is recorded anew each time, at the parameters' values of that time, and
    dropped: three gradients' time, for many batches (`averaged`).

    Reverse over reverse: the derivative of the gradient is H' = H.
    """
    point = _point(parameters, keep)

    def record() -> Linear:
        pull = vjp(grad(loss), point)[1]
        return lambda direction: pull(direction)[0]

    return _product(record, point, keep)


def gauss_newton_vector_product(
    model: Callable[[Tensors], Tensor],
    parameters: Mapping[str, Tensor],
    loss: Callable[[Tensor], Tensor],
    *,
    keep: bool = True,
) -> Product:
    """The map v -> J' H J v, J the Jacobian of `model` at `parameters`, H the Hessian of `loss`.

    model: maps parameters by name to outputs of any shape; loss: maps these outputs to a scalar,
    for instance `lambda logits: cross_entropy(logits, labels)`. Positive semi-definite where the
    loss is convex in the outputs, as cross-entropy is in the logits, and then what the Hessian
    keeps as the model fits (Schraudolph 2002). keep: as for `hessian_vector_product`.

    J v is the adjoint of J' v, so that reverse mode alone is needed.
    """
    point = _point(parameters, keep)

    def record() -> Linear:
        outputs, pull, *_ = vjp(model, point)
        curve = vjp(grad(loss), outputs)[1]
        push = vjp(lambda cotangent: pull(cotangent)[0], torch.zeros_like(outputs))[1]
        return lambda direction: pull(curve(push(direction)[0])[0])[0]

    return _product(record, point, keep)


def averaged(products: Sequence[Product], weights: Sequence[float] | None = None) -> Product:
    """The mean of the maps, of equal or of given weight (they need not sum to 1).

    For batches of different sizes the weights are the sizes, if their losses are means. With
    products made with `keep=False` one batch's memory is in use at a time.

    Raises ValueError without a product, for another number of weights, or for negative ones or a
    sum of 0.
    """
    shares = [1.0] * len(products) if weights is None else [float(w) for w in weights]
    if len(shares) != len(products) or min(shares, default=-1) < 0 or not sum(shares) > 0:
        raise ValueError(
            f"need a weight of at least 0 for each of {len(products)} products, and a positive one "
            f"among them; got {weights}"
        )
    total = sum(shares)

    def product(v: V) -> V:
        result: V | None = None
        for part, share in zip(products, shares, strict=True):
            result = _added(result, part(v), share / total)
        assert result is not None
        return result

    return product


def _point(parameters: Mapping[str, Tensor], keep: bool) -> Tensors:
    """Apart from the parameters if kept: a record does not notice that they change in place."""
    point = {name: tensor.detach() for name, tensor in parameters.items()}
    return {name: tensor.clone() for name, tensor in point.items()} if keep else point


def _product(record: Callable[[], Linear], point: Tensors, keep: bool) -> Product:
    kept = record() if keep else None

    def product(v: V) -> V:
        apply = kept or record()
        with torch.no_grad():
            if isinstance(v, dict):
                return apply(_fitted(v, point))
            return torch.cat([part.flatten() for part in apply(_unflatten(v, point)).values()])

    return product


def _added(total: V | None, part: V, share: float) -> V:
    if isinstance(part, dict):
        before: Mapping[str, Tensor | None] = total or dict.fromkeys(part)
        return {name: _added(before[name], tensor, share) for name, tensor in part.items()}
    return part * share if total is None else total.add(part, alpha=share)


def _unflatten(v: Tensor, like: Tensors) -> Tensors:
    sizes = [tensor.numel() for tensor in like.values()]
    if v.shape != (sum(sizes),):
        raise ValueError(f"expected a vector of {sum(sizes)} parameters, got {tuple(v.shape)}")
    parts = zip(v.split(sizes), like.items(), strict=True)
    return {name: part.reshape(tensor.shape).to(tensor) for part, (name, tensor) in parts}


def _fitted(v: Tensors, like: Tensors) -> Tensors:
    expected = {name: tuple(tensor.shape) for name, tensor in like.items()}
    got = {name: tuple(tensor.shape) for name, tensor in v.items()}
    if got != expected:
        raise ValueError(f"expected vectors of shapes {expected}, got {got}")
    return {name: v[name].to(tensor) for name, tensor in like.items()}
