"""The candidates nearest to targets, over pools that lie on disk."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsel_assets.selection.arrays import chunks
from dsel_assets.selection.kernels import Kernel

Array = NDArray[Any]


def nearest(X: Array, T: Array, k: int, kernel: Kernel) -> Array:
    """Of each target the k candidates that f correlates most with: [m, min(k, N)] int64.

    By falling k(x, t)/sqrt(k(x, x) k(t, t)), the cosine where the kernel is linear; equal ones by
    index. Rows of variance 0 correlate with nothing.
    """
    if k < 1:
        raise ValueError(f"{k} nearest candidates: it must be at least 1")
    values, indices = np.empty((len(T), 0)), np.empty((len(T), 0), np.int64)
    deviations = np.sqrt(kernel.diagonal(T))
    start = 0
    for rows in chunks(X):
        scale = np.sqrt(kernel.diagonal(rows))[:, None] * deviations
        there = scale > 0
        correlations = np.where(there, kernel.matrix(rows, T) / np.where(there, scale, 1), 0.0)
        place = np.broadcast_to(np.arange(start, start + len(rows)), correlations.T.shape)
        values = np.concatenate([values, correlations.T], axis=1)
        indices = np.concatenate([indices, place], axis=1)
        # the cut keeps what equals its last: which of equal ones is decided by index, below
        if values.shape[1] > k:
            values, indices = _largest(values, indices, k)
        start += len(rows)
    order = np.lexsort((indices, -values), axis=1)
    return np.take_along_axis(indices, order, axis=1)


def _largest(values: Array, indices: Array, k: int) -> tuple[Array, Array]:
    """The k largest of each row; of those that equal the last, the first by index."""
    cut = -np.partition(-values, k - 1, axis=1)[:, k - 1 : k]
    above = values > cut
    room = k - above.sum(1, keepdims=True)
    equal = values == cut
    kept = above | (equal & (np.cumsum(equal, axis=1) <= room))
    return values[kept].reshape(len(values), k), indices[kept].reshape(len(values), k)
