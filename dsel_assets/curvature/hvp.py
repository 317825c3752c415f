"""Hessian-vector products of a loss, without the Hessian."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp


def hessian_vector_product(
    loss: Callable[[dict[str, Tensor]], Tensor], parameters: dict[str, Tensor]
) -> Callable[[Tensor], Tensor]:
    """The map v -> H v, H the Hessian of `loss` at `parameters`.

    loss: maps parameters by name to a scalar, and computes by torch functions alone. The returned
    function takes and gives flat vectors [p], the tensors in the order of `parameters`; any real
    dtype goes in, the parameters' dtype comes out.

    Forward over reverse (Pearlmutter 1994: about two gradients' time); where an operation of the
    loss lacks forward mode, reverse over reverse, the same by symmetry of H.

    Raises ValueError if a vector does not have p entries.
    """
    point = {name: tensor.detach() for name, tensor in parameters.items()}
    gradient = grad(loss)
    size = sum(tensor.numel() for tensor in point.values())
    forward_mode = True

    def product(v: Tensor) -> Tensor:
        nonlocal forward_mode
        if v.shape != (size,):
            raise ValueError(f"expected a vector of {size} parameters, got shape {tuple(v.shape)}")
        direction = _unflatten(v, point)
        if forward_mode:
            try:
                return _flatten(jvp(gradient, (point,), (direction,))[1])
            except NotImplementedError:
                forward_mode = False
        return _flatten(vjp(gradient, point)[1](direction)[0])

    return product


def _flatten(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def _unflatten(v: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = v.split([tensor.numel() for tensor in like.values()])
    return {
        name: part.reshape(tensor.shape).to(tensor)
        for part, (name, tensor) in zip(parts, like.items(), strict=True)
    }
