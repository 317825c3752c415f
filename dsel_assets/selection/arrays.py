"""Arrays as the array-level functions take them: numpy, memory-mapped or torch, any float dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]

CHUNK = 2**21  # numbers that are in memory twice


def as_rows(values: ArrayLike, name: str) -> Array:
    """A matrix of finite rows as a C-ordered numpy array, float64 if it was or if integer.

    Torch tensors come to the CPU; half precision and bfloat16 become float32. Of examples that
    have several rows each, [N, k, m], those of one example become one.

    Raises:
        ValueError: no such array, empty, or with rows that are not finite; names the rows.
    """
    array = as_blocks(values, name)
    return array.reshape(len(array), -1)


def as_blocks(values: ArrayLike, name: str) -> Array:
    """As `as_rows`, but [N, k, m]: k rows an example, one where a matrix is given.

    An array that is float32 or float64 already is not copied, so that it may lie on disk.
    """
    given: Any = values
    if hasattr(given, "detach"):
        given = given.detach().cpu()
        given = (given if given.element_size() == 8 else given.float()).numpy()
    given = np.asarray(given)
    single = given.dtype.kind == "f" and given.dtype.itemsize <= 4
    array: Array = np.asarray(given, np.float32 if single else np.float64, order="C")
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; it must be [rows, features], not empty")
    array = array.reshape(len(array), -1, array.shape[-1])
    finite = [np.isfinite(part).all((1, 2)) for part in chunks(array)]
    bad = np.flatnonzero(~np.concatenate(finite))
    if len(bad):
        listed = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        raise ValueError(f"{name} has {len(bad)} rows that are not finite: {listed}")
    return array


def chunks(array: Array) -> Iterator[Array]:
    """Consecutive rows of an array, as many at a time as memory is to hold of them."""
    rows = max(1, CHUNK // max(1, array[:1].size))
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def directions(rows: Array, centre: Array) -> Array:
    """Rows [N, d] seen from a centre [d], each of unit norm: float32, zeros where a row is there.

    Centring takes out what all rows share, unit norm the bias towards long ones.
    """
    moved = (rows - centre).astype(np.float32)
    norms = np.linalg.norm(moved, axis=1, keepdims=True)
    return moved / np.where(norms > 0, norms, 1)
