"""Attribution: how much a step on each example of a pool would help on each target.

The rows are (sketched) gradients of the loss, so that inner products are what a small step of
gradient descent on one example takes off the loss of another.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]

HOW = ("dot", "cosine", "trak")


def attribution(
    pool: ArrayLike,
    target: ArrayLike,
    *,
    how: str = "cosine",
    damping: float = 0.1,
    groups: ArrayLike | None = None,
    block_bytes: int = 1 << 23,
) -> NDArray[np.float64]:
    """Scores of every row x of the pool against every row t of the target; higher helps more.

        dot      <x, t>
        cosine   <x, t> / (|x| |t|), and 0 where a row is zero
        trak     <x, (F + lambda I)^-1 t>,  F = sum_i x_i x_i' / N

    F is the empirical Fisher of the sketches and lambda = damping * tr(F) / D, a multiple of its
    mean eigenvalue: large, and the order is that of dot; small, and what few examples say counts
    as much as what all say. TRAK (S. M. Park, K. Georgiev, A. Ilyas, G. Leclerc, A. Madry, ICML
    2023, arXiv:2303.14186) takes gradients of the model's output f = log(p / (1 - p)), p the
    probability of the label, and multiplies row i by 1 - p_i. The gradient of the loss -log p is
    -(1 - p) times that of f: these rows carry the factor, and to multiply once more would count it
    twice. What differs from TRAK is that the factor is in F as well, squared, and in t, where it
    lets targets that are fitted badly count more in a mean. For rows that are gradients of f,
    multiply row i of the result by 1 - p_i.

    Everything accumulates in double. The pool is read in blocks, twice for trak, and never copied
    as a whole: a memory-mapped one takes block_bytes, the output and, for trak, three times
    8 D^2 bytes.

    Args:
        pool: [N, D] numpy array or torch tensor of any real dtype.
        target: [m, D].
        how: "dot", "cosine" or "trak".
        damping: lambda in units of the mean eigenvalue of F; read by trak alone.
        groups: [m] labels of the targets. The scores are then means over the targets of each
            group, G columns in the order of np.unique(groups), at the cost of G targets; equal
            labels throughout give the mean over all.
        block_bytes: memory for the rows that are in work, in double.

    Returns:
        [N, m] or [N, G] float64; dot and trak in squared units of the rows and in none.

    Raises:
        ValueError: unknown how, a damping or block_bytes that is not positive, a damping below
            what double precision can invert, arrays that are empty or do not fit together, rows
            that are not finite or whose squared norm is not (those of the first such block are
            named).
    """
    if how not in HOW:
        raise ValueError(f"unknown how {how!r}; one of {', '.join(HOW)}")
    if not 0 < damping < np.inf:
        raise ValueError(f"damping = {damping}: it must be positive and finite")
    if block_bytes < 1:
        raise ValueError(f"block_bytes = {block_bytes}: it must be positive")
    X, T = _matrix(pool, "pool"), _matrix(target, "target")
    if X.shape[1] != T.shape[1]:
        raise ValueError(f"pool has {X.shape[1]} features but target {T.shape[1]}")
    directions = _means(T, groups, how == "cosine", block_bytes)
    if how == "trak":
        directions = _solve(_second_moment(X, block_bytes), directions, damping)
    scores = np.empty((len(X), len(directions)))
    for part, rows, norms in _blocks(X, "pool", block_bytes):
        scores[part] = rows @ directions.T
        if how == "cosine":
            scores[part] /= _divisors(norms)
    return scores


def _means(T: Any, groups: ArrayLike | None, unit: bool, block_bytes: int) -> Array:
    """Mean row of each group [G, D]: every score is linear in the target, or in its direction."""
    labels = np.arange(len(T)) if groups is None else np.asarray(groups)
    if labels.shape != (len(T),):
        raise ValueError(f"groups has shape {labels.shape}; it must be [{len(T)}], one a target")
    _, columns, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.zeros((len(sizes), T.shape[1]))
    for part, rows, norms in _blocks(T, "target", block_bytes):
        np.add.at(sums, columns[part], rows / _divisors(norms) if unit else rows)
    return sums / sizes[:, None]


def _second_moment(X: Any, block_bytes: int) -> Array:
    F = np.zeros((X.shape[1], X.shape[1]))
    for _, rows, _ in _blocks(X, "pool", block_bytes):
        F += rows.T @ rows
    F /= len(X)
    return F


def _solve(F: Array, directions: Array, damping: float) -> Array:
    from scipy.linalg import LinAlgError, LinAlgWarning, solve

    # a pool of zeros has no scale, and whatever is added scores 0
    F.flat[:: len(F) + 1] += damping * F.trace() / len(F) or 1.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", LinAlgWarning)
            solved: Array = solve(F, directions.T, assume_a="pos", overwrite_a=True)
    except (LinAlgError, LinAlgWarning) as error:
        raise ValueError(f"damping = {damping} is too small for double precision") from error
    return solved.T


def _matrix(values: ArrayLike, name: str) -> Any:
    """The values themselves if they are an array or a tensor of rows: nothing is copied."""
    given: Any = values if hasattr(values, "shape") else np.asarray(values)
    if len(given.shape) != 2 or 0 in given.shape:
        shape = tuple(given.shape)
        raise ValueError(f"{name} has shape {shape}; it must be [rows, features], not empty")
    return given


def _blocks(X: Any, name: str, block_bytes: int) -> Iterator[tuple[slice, Array, Array]]:
    """Where each block lies, its rows in double and their norms [rows, 1]."""
    step = max(1, block_bytes // (8 * X.shape[1]))
    for start in range(0, len(X), step):
        part = slice(start, start + step)
        block = X[part]
        if hasattr(block, "detach"):
            block = block.detach().cpu().double().numpy()
        rows = np.asarray(block, dtype=np.float64)
        with np.errstate(over="ignore"):
            squares = np.einsum("ij,ij->i", rows, rows)[:, None]
        bad = start + np.flatnonzero(~np.isfinite(squares))
        if len(bad):
            listed = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
            raise ValueError(f"{name} has rows that are not finite: {listed}")
        yield part, rows, np.sqrt(squares)


def _divisors(norms: Array) -> Array:
    return np.where(norms > 0, norms, 1)
