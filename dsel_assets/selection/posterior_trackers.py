"""Gaussian processes that observe one row after another, followed at many rows at once.

Several processes see the same rows but began differently: for ITL one that had seen nothing and
one that had seen the targets. Conditioning commutes, so the second keeps Var[f_x | y_A, D] by the
same rank-one steps that keep Var[f_x | D]:

    cov(x, y) -= f_x f_y,    f = cov(., p) / sqrt(cov(p, p) + noise)    when p is observed.

Two forms. `FeatureForm`, where the kernel is linear, keeps the covariance of the weights as
I - B'B and takes the f of all its processes from one pass over the rows, whatever was observed
before. `FactorForm`, for any kernel, keeps every f: with k of them a step costs a column of the
kernel and 2k for each row and process. Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from dsel_assets.selection.kernels import Kernel, Linear, doubles, products
from dsel_assets.selection.passes import compiled

Array = NDArray[Any]


class Start(NamedTuple):
    """What a process has observed before it is followed: rows [k, d], their noise variances [k]."""

    rows: Array
    noise: Array


class Step(NamedTuple):
    """One observation.

    variances: [processes], of f at the observed row, before.
    fall: [N], f of the first process at the candidates.
    target_fall: [m], the same at the targets.
    toward: [N], sum over the targets of weight times cov(x, t), before; None where not asked for.
    """

    variances: list[float]
    fall: Array
    target_fall: Array
    toward: Array | None


Weights = Callable[[Array], Array | None]


class Posterior(Protocol):
    """Processes that see the same rows.

    variances: for each process [N] float64, of f at the candidates.
    target_variance: [m] float64, of f at the targets, in the first process.
    """

    variances: list[Array]
    target_variance: Array

    def observe(self, p: int, weights: Weights) -> Step:
        """Observe candidate p. weights: of the targets, [m] from target_fall, for `toward`."""
        ...

    def cross(self) -> Iterator[Array]:
        """Covariances with the targets in the first process, [., m] of consecutive candidates."""
        ...


class FeatureForm:
    """The linear kernel: f = <theta, x>, theta ~ N(0, I). A step is one pass over the candidates.

    followed: of how many processes the variance at the candidates is kept; of the others only that
    of the observed rows is known.
    """

    def __init__(
        self, X: Array, T: Array, noise: float, starts: Sequence[Start], followed: int
    ) -> None:
        self._X, self._T, self._noise = X, T.astype(np.float64), noise
        self._B = [_Stack(_explained(*start), 2 * X.shape[1]) for start in starts]
        bases = [B.rows for B in self._B[:followed]]
        self.variances = _left(X, bases)
        self.target_variance = _left(self._T, bases[:1])[0]

    def cross(self) -> Iterator[Array]:
        """As in `Posterior`."""
        B = self._B[0].rows
        directions = (self._T - (self._T @ B.T) @ B).T
        return (rows @ directions for rows in doubles(self._X))

    def observe(self, p: int, weights: Weights) -> Step:
        """As in `Posterior`."""
        x = self._X[p].astype(np.float64)
        variances, directions = [], []
        for stack in self._B:
            u = _remainder(stack.rows, x)
            variances.append(max(float(x @ u), 0.0))
            directions.append(u / np.sqrt(variances[-1] + self._noise))
        fall = self._T @ directions[0]
        wanted = weights(fall)
        vectors = directions[: len(self.variances)]
        if wanted is not None:
            vectors = [*vectors, _remainder(self._B[0].rows, self._T.T @ wanted)]
        found = products(self._X, np.array(vectors))
        for stack, direction in zip(self._B, directions, strict=True):
            stack.push(direction)
        for variance, change in zip(self.variances, found, strict=False):
            variance -= change**2
        self.target_variance -= fall**2
        return Step(variances, found[0], fall, None if wanted is None else found[-1])


class FactorForm:
    """Any kernel: the pivoted Cholesky factor of each process at the candidates and the targets."""

    def __init__(
        self, kernel: Kernel, X: Array, T: Array, noise: float, starts: Sequence[Start]
    ) -> None:
        self._kernel, self._X, self._T, self._noise = kernel, X, T, noise
        self._across = self._columns(T) if len(T) else np.empty((0, len(X)))
        prior = np.concatenate([kernel.diagonal(rows) for rows in (X, T) if len(rows)])
        self._F, self._variances = [], []
        for rows, noises in starts:
            factor = np.empty((0, len(prior)))
            if len(rows):
                root = np.linalg.cholesky(kernel.matrix(rows, rows) + np.diag(noises))
                factor = solve_triangular(root, self._columns(rows), lower=True)
            self._F.append(_Stack(factor))
            self._variances.append(prior - np.square(factor).sum(0))
        self.variances = [variance[: len(X)] for variance in self._variances]
        self.target_variance = self._variances[0][len(X) :]

    def _columns(self, rows: Array) -> Array:
        """Kernel [k, N + m] of rows [k, d] with the candidates and the targets."""
        every = (points for points in (self._X, self._T) if len(points))
        parts = [self._kernel.matrix(points, rows).T for points in every]
        return np.concatenate(parts, axis=1)

    def cross(self) -> Iterator[Array]:
        """As in `Posterior`."""
        F, N = self._F[0].rows, len(self._X)
        yield (self._across[:, :N] - F[:, N:].T @ F[:, :N]).T

    def observe(self, p: int, weights: Weights) -> Step:
        """As in `Posterior`."""
        N = len(self._X)
        column = self._columns(self._X[p : p + 1])[0]
        before = [max(float(variance[p]), 0.0) for variance in self.variances]
        falls = [
            (column - stack.rows[:, p] @ stack.rows) / np.sqrt(variance + self._noise)
            for stack, variance in zip(self._F, before, strict=True)
        ]
        wanted, toward = weights(falls[0][N:]), None
        if wanted is not None:
            F = self._F[0].rows
            toward = wanted @ self._across[:, :N] - (F[:, N:] @ wanted) @ F[:, :N]
        for stack, fall, variance in zip(self._F, falls, self._variances, strict=True):
            stack.push(fall)
            variance -= fall**2
        return Step(before, falls[0][:N], falls[0][N:], toward)


def follow(
    kernel: Kernel, X: Array, T: Array, noise: float, starts: Sequence[Start], followed: int
) -> Posterior:
    """The form that costs less.

    With a linear kernel that is the feature form always: the factor form needs the same pass over
    the rows for its column of the kernel, and all that it keeps on top.
    """
    if isinstance(kernel, Linear):
        return FeatureForm(X, T, noise, starts, followed)
    return FactorForm(kernel, X, T, noise, starts)


class _Stack:
    """Rows that grow by one; beyond a limit, fewer with the same B'B take their place."""

    def __init__(self, rows: Array, limit: int | None = None) -> None:
        self._held, self._size, self._limit = rows, len(rows), limit

    @property
    def rows(self) -> Array:
        return self._held[: self._size]

    def push(self, row: Array) -> None:
        if self._size == self._limit:
            triangle: Any = np.linalg.qr(self.rows, mode="r")
            self._held = triangle
            self._size = len(self._held)
        if self._size == len(self._held):
            room = np.empty((max(16, self._size), self._held.shape[1]))
            self._held = np.concatenate([self._held, room])
        self._held[self._size] = row
        self._size += 1


def _explained(rows: Array, noise: Array) -> Array:
    """B [k, d] such that I - B'B is the covariance of theta after these rows; k <= d."""
    if len(rows) == 0:
        return np.empty((0, rows.shape[1]))
    scaled = rows.astype(np.float64) / np.sqrt(noise)[:, None]
    if len(rows) <= rows.shape[1]:
        root = np.linalg.cholesky(scaled @ scaled.T + np.eye(len(rows)))
        return np.asarray(solve_triangular(root, scaled, lower=True))
    _, sigma, directions = np.linalg.svd(scaled, full_matrices=False)
    return (sigma / np.sqrt(sigma**2 + 1))[:, None] * directions


def _left(rows: Array, bases: Sequence[Array]) -> list[Array]:
    """What bases B [k, d] leave of the squared norms of rows [b, d]: [b] for each."""
    norms = Linear().diagonal(rows)
    every = np.concatenate(bases)
    if len(every) == 0:
        return [norms.copy() for _ in bases]
    first = np.cumsum([0, *map(len, bases)])
    parts = []
    for part in doubles(rows):
        squares = np.square(part @ every.T)
        parts.append([squares[:, a:b].sum(1) for a, b in pairwise(first)])
    return [norms - np.concatenate(column) for column in zip(*parts, strict=True)]


@compiled
def _remainder(B: Array, x: Array) -> Array:
    """(I - B'B) x, reading B [k, d] once, four rows at a time."""
    k, d = B.shape
    found = x.copy()
    fours = k - k % 4
    for i in range(0, fours, 4):
        a0 = a1 = a2 = a3 = 0.0
        for c in range(d):
            a0 += B[i, c] * x[c]
            a1 += B[i + 1, c] * x[c]
            a2 += B[i + 2, c] * x[c]
            a3 += B[i + 3, c] * x[c]
        for c in range(d):
            found[c] -= a0 * B[i, c] + a1 * B[i + 1, c] + a2 * B[i + 2, c] + a3 * B[i + 3, c]
    for i in range(fours, k):
        total = 0.0
        for c in range(d):
            total += B[i, c] * x[c]
        for c in range(d):
            found[c] -= total * B[i, c]
    return found
