"""Gradients of linear layers by what they are made of: inputs, and gradients of the outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsel_assets.sketching.matrix import MatrixSketch
from dsel_assets.sketching.operator import accumulation_dtype

_CHUNK = 2**22  # numbers that exist at a time


@dataclass(frozen=True)
class Formed:
    """The gradients themselves, [n, ...]."""

    gradients: Tensor

    def sketch(self, sketch: MatrixSketch) -> Tensor:
        """[n, D]."""
        return sketch(self.gradients.flatten(1))

    def squared_norms(self) -> Tensor:
        """[n] float64."""
        return _squares(self.gradients)


@dataclass(frozen=True)
class Products:
    """sum_t d_t x_t^T over the tokens: inputs x [n, T, in], output gradients d [n, T, out]."""

    inputs: Tensor
    output_gradients: Tensor

    def sketch(self, sketch: MatrixSketch) -> Tensor:
        """[n, D]."""
        return sketch.of_factors(self.inputs, self.output_gradients)

    def squared_norms(self) -> Tensor:
        """[n] float64: the sum over t, s of (x_t . x_s) (d_t . d_s), or by the products if cheaper.

        In double precision no square of a float32 overflows.
        """
        (_, T, columns), rows = self.inputs.shape, self.output_gradients.shape[2]
        together = max(_CHUNK // max(T * (rows + columns), 1), 1)
        few = T * (rows + columns) <= rows * columns
        squares = _squares_from_grams if few else _squares_from_products
        parts = zip(self.inputs.split(together), self.output_gradients.split(together), strict=True)
        return torch.cat([squares(x, d) for x, d in parts])


@dataclass(frozen=True)
class Lookups:
    """Row r is the sum of d_t over t with indices_t = r: indices [n, T], d [n, T, columns]."""

    indices: Tensor
    output_gradients: Tensor

    def sketch(self, sketch: MatrixSketch) -> Tensor:
        """[n, D]."""
        return sketch.of_lookups(self.indices, self.output_gradients)

    def squared_norms(self) -> Tensor:
        """[n] float64."""
        _, T, columns = self.output_gradients.shape
        together = max(_CHUNK // max(T * columns, 1), 1)
        parts = zip(
            self.indices.split(together), self.output_gradients.split(together), strict=True
        )
        return torch.cat([_squares_of_rows(indices, d) for indices, d in parts])


Gradient = Formed | Products | Lookups


def layer_gradients(
    layer: nn.Module, inputs: Tensor, output_gradients: Tensor
) -> Iterator[tuple[slice, dict[str, Gradient]]]:
    """Of some examples at a time: which, and the gradients of the layer's weight and bias.

    inputs, output_gradients: of a call of an nn.Linear, nn.Embedding or nn.Conv2d, examples first.
    A convolution is a linear layer on its unfolded inputs, a few of which exist at a time.
    """
    if isinstance(layer, nn.Conv2d):
        yield from _convolution(layer, inputs, output_gradients)
        return
    n = len(inputs)
    d = output_gradients.reshape(n, -1, output_gradients.shape[-1])
    if isinstance(layer, nn.Embedding):
        indices = inputs.reshape(n, -1)
        if layer.padding_idx is not None:
            d = d * (indices != layer.padding_idx)[..., None]
        yield slice(0, n), {"weight": Lookups(indices, d)}
    else:
        yield (
            slice(0, n),
            {
                "weight": Products(inputs.reshape(n, -1, inputs.shape[-1]), d),
                "bias": Formed(d.sum(1, dtype=accumulation_dtype(d.dtype))),
            },
        )


def _convolution(
    layer: nn.Conv2d, inputs: Tensor, output_gradients: Tensor
) -> Iterator[tuple[slice, dict[str, Gradient]]]:
    d = output_gradients.flatten(2)
    together = max(_CHUNK // (d.shape[2] * layer.weight[0].numel() * layer.groups), 1)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    for start in range(0, len(d), together):
        part = slice(start, min(start + together, len(d)))
        padded = F.pad(inputs[part], layer._reversed_padding_repeated_twice, mode=mode)
        x = F.unfold(padded, layer.kernel_size, layer.dilation, stride=layer.stride)
        weight: Gradient = Products(x.mT, d[part].mT)
        if layer.groups > 1:
            left, right = (_widened(f).unflatten(1, (layer.groups, -1)) for f in (d[part], x))
            weight = Formed(left @ right.mT)
        yield (
            part,
            {"weight": weight, "bias": Formed(d[part].sum(2, dtype=accumulation_dtype(d.dtype)))},
        )


def _squares_from_grams(x: Tensor, d: Tensor) -> Tensor:
    return (_gram(x) * _gram(d)).sum((1, 2))


def _squares_from_products(x: Tensor, d: Tensor) -> Tensor:
    x, height = _widened(x), max(_CHUNK // (len(x) * x.shape[2]), 1)
    return torch.stack([_squares(_widened(rows).mT @ x) for rows in d.split(height, 2)]).sum(0)


def _squares_of_rows(indices: Tensor, d: Tensor) -> Tensor:
    example = torch.arange(len(indices), device=indices.device)[:, None].expand_as(indices)
    pairs = torch.stack((example, indices)).flatten(1)
    (owners, _), place = pairs.unique(dim=1, return_inverse=True)
    values = _widened(d.flatten(0, 1))
    rows = values.new_zeros(len(owners), d.shape[2]).index_add_(0, place, values)
    return rows.new_zeros(len(d), dtype=torch.float64).index_add_(0, owners, _squares(rows))


def _gram(x: Tensor) -> Tensor:
    return x.double() @ x.double().mT


def _squares(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64).square()


def _widened(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))
