"""The fast Walsh-Hadamard transform, by additions alone."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """H x along the first dimension, H_ij = (-1)^popcount(i & j), not normalised: [n, ...] -> same.

    n is a power of two. Elementwise butterflies in an order set by n alone: the bits of a column do
    not depend on the other columns or on the number of threads.
    """
    size = x.shape[0]
    if size & (size - 1):
        raise ValueError(f"the first dimension must be a power of two, got {size}")
    source = x.reshape(size, -1)
    target, spare = source.new_empty(source.shape), source.new_empty(source.shape)
    half = size // 2
    while half:
        top, bottom = source.reshape(size // (2 * half), 2, -1).unbind(1)
        out = target.view(size // (2 * half), 2, -1)
        torch.add(top, bottom, out=out[:, 0])
        torch.sub(top, bottom, out=out[:, 1])
        source, target, spare = target, spare, target
        half //= 2
    return source.reshape(x.shape)
