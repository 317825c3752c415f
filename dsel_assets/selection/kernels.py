"""Kernels: how much f at one row says about f at another.

A kernel has `diagonal(rows)` and `matrix(rows, others)`; any object that has both will do. Values
are float64 whatever the rows are, and no row is copied to make them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dsel_assets.selection.passes import CONVERTED, compiled, share_out

Array = NDArray[Any]

FEW = 4  # vectors up to which a pass over the rows is faster than a product of matrices


class Kernel(Protocol):
    """The prior covariance of f."""

    def diagonal(self, rows: Array) -> Array:
        """k(x, x) [N] float64 of rows [N, d]."""
        ...

    def matrix(self, rows: Array, others: Array) -> Array:
        """k(x, y) [N, q] float64 of rows [N, d] and others [q, d]."""
        ...


@dataclass(frozen=True)
class Linear:
    """k(x, y) = <x, y>: f is linear in the row, with a standard normal weight on each feature."""

    def diagonal(self, rows: Array) -> Array:
        """Squared norms [N]."""
        found = np.empty(len(rows))
        share_out(rows, lambda start, stop: _norms(rows, found, start, stop))
        return found

    def matrix(self, rows: Array, others: Array) -> Array:
        """Inner products [N, q]."""
        if len(others) <= FEW:
            return products(rows, others).T
        return np.concatenate([part @ others.astype(np.float64).T for part in doubles(rows)])


class _Radial:
    lengthscale: float

    def __post_init__(self) -> None:
        if not 0 < self.lengthscale < np.inf:
            raise ValueError(f"lengthscale = {self.lengthscale} must be positive and finite")

    def diagonal(self, rows: Array) -> Array:
        """Ones [N]."""
        return np.ones(len(rows))

    def matrix(self, rows: Array, others: Array) -> Array:
        """[N, q], from differences: equal rows have exactly k = 1."""
        squares = np.empty((len(others), len(rows)))
        vectors = np.ascontiguousarray(others, np.float64)
        share_out(rows, lambda start, stop: _squares(rows, vectors, squares, start, stop))
        squares /= self.lengthscale**2
        return self._of(squares).T

    def _of(self, squares: Array) -> Array:
        raise NotImplementedError


@dataclass(frozen=True)
class Rbf(_Radial):
    """k(x, y) = exp(-r^2/2), r = |x - y| / lengthscale."""

    lengthscale: float = 1.0

    def _of(self, squares: Array) -> Array:
        return np.exp(squares / -2)


@dataclass(frozen=True)
class Matern(_Radial):
    """The Matern kernel of smoothness 0.5, 1.5 or 2.5, of r = |x - y| / lengthscale."""

    lengthscale: float = 1.0
    smoothness: float = 2.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smoothness not in (0.5, 1.5, 2.5):
            raise ValueError(f"smoothness = {self.smoothness}: there are 0.5, 1.5 and 2.5")

    def _of(self, squares: Array) -> Array:
        r = np.sqrt(2 * self.smoothness * squares)
        polynomial = {0.5: 1.0, 1.5: 1 + r, 2.5: 1 + r + r**2 / 3}[self.smoothness]
        return np.asarray(polynomial * np.exp(-r))


@dataclass(frozen=True)
class LossGradient:
    """The kernel of loss gradients by the last linear layer, which are never formed.

    A row is [g, h]: first the gradient by the C outputs (for the cross-entropy p - onehot(label)),
    then the d inputs of the layer. The layer's gradient is the outer product of the two, so that
    k(x, y) = <g, g'> (<h, h'> + bias) costs C + d instead of C d (the embedding of BADGE,
    J. Ash et al., ICLR 2020, arXiv:1906.03671).

    outputs: C.   bias: the layer has one.
    """

    outputs: int
    bias: bool = True

    def diagonal(self, rows: Array) -> Array:
        """Squared norms [N] of the gradients."""
        g, h = self._split(rows)
        return Linear().diagonal(g) * (Linear().diagonal(h) + self.bias)

    def matrix(self, rows: Array, others: Array) -> Array:
        """Inner products [N, q] of the gradients."""
        (g, h), (g_others, h_others) = self._split(rows), self._split(others)
        return Linear().matrix(g, g_others) * (Linear().matrix(h, h_others) + self.bias)

    def _split(self, rows: Array) -> tuple[Array, Array]:
        if not 0 < self.outputs < rows.shape[1]:
            raise ValueError(f"outputs = {self.outputs} of rows of {rows.shape[1]} numbers")
        return rows[:, : self.outputs], rows[:, self.outputs :]


KERNELS: dict[str, Callable[[], Kernel]] = {"linear": Linear, "rbf": Rbf, "matern": Matern}


def make_kernel(kernel: str | Kernel) -> Kernel:
    """A kernel by its name, with its defaults, or the one given."""
    if not isinstance(kernel, str):
        return kernel
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; by name there are {', '.join(KERNELS)}")
    return KERNELS[kernel]()


def doubles(rows: Array) -> Iterator[Array]:
    """Consecutive rows in double precision, as many at a time as the cache holds of them."""
    size = max(1, CONVERTED // rows.shape[1])
    parts = (rows[start : start + size] for start in range(0, len(rows), size))
    return (part.astype(np.float64, copy=False) for part in parts)


def products(rows: Array, vectors: Array) -> Array:
    """Inner products [q, N] float64 of rows [N, d] with vectors [q, d], in one pass."""
    found = np.empty((len(vectors), len(rows)))
    vectors = np.ascontiguousarray(vectors, np.float64)
    share_out(rows, lambda start, stop: _products(rows, vectors, found, start, stop))
    return found


@compiled
def _products(rows: Array, vectors: Array, found: Array, start: int, stop: int) -> None:
    """Two vectors with four rows at a time: a row is read once for both, a vector once for four."""
    q, d = vectors.shape
    fours = stop - (stop - start) % 4
    for j in range(0, q - 1, 2):
        for i in range(start, fours, 4):
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = 0.0
            for c in range(d):
                u, w = vectors[j, c], vectors[j + 1, c]
                x0, x1 = np.float64(rows[i, c]), np.float64(rows[i + 1, c])
                x2, x3 = np.float64(rows[i + 2, c]), np.float64(rows[i + 3, c])
                a0 += x0 * u
                a1 += x1 * u
                a2 += x2 * u
                a3 += x3 * u
                b0 += x0 * w
                b1 += x1 * w
                b2 += x2 * w
                b3 += x3 * w
            found[j, i], found[j, i + 1], found[j, i + 2], found[j, i + 3] = a0, a1, a2, a3
            found[j + 1, i], found[j + 1, i + 1] = b0, b1
            found[j + 1, i + 2], found[j + 1, i + 3] = b2, b3
    for j in range(q):
        alone = j == q - 1 and q % 2
        for i in range(start if alone else fours, stop):
            total = 0.0
            for c in range(d):
                total += np.float64(rows[i, c]) * vectors[j, c]
            found[j, i] = total


@compiled
def _norms(rows: Array, found: Array, start: int, stop: int) -> None:
    for i in range(start, stop):
        total = 0.0
        for c in range(rows.shape[1]):
            x = np.float64(rows[i, c])
            total += x * x
        found[i] = total


@compiled
def _squares(rows: Array, vectors: Array, found: Array, start: int, stop: int) -> None:
    """Squared distances."""
    for i in range(start, stop):
        for j in range(vectors.shape[0]):
            total = 0.0
            for c in range(vectors.shape[1]):
                difference = np.float64(rows[i, c]) - vectors[j, c]
                total += difference * difference
            found[j, i] = total
