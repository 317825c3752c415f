"""Which classes and clusters of a pool a subset reaches."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsel_assets.selection.arrays import as_rows

MOST_CLUSTERS = 64


def clusters(sketches: ArrayLike, count: int, *, seed: int = 0) -> NDArray[np.int64]:
    """Cluster of each row [N] by k-means, at least 1 and at most 64 of them.

    Where directions rather than places tell rows apart, hand in rows of norm 1.
    """
    from sklearn.cluster import MiniBatchKMeans

    rows = as_rows(sketches, "sketches")
    count = max(1, min(count, MOST_CLUSTERS, len(rows)))
    means = MiniBatchKMeans(count, random_state=seed, n_init=3, batch_size=4096)
    found: NDArray[np.int64] = means.fit_predict(rows).astype(np.int64)
    return found


def covered(parts: ArrayLike, indices: ArrayLike) -> float:
    """Share of the parts of a pool (classes, clusters; [N]) that the chosen rows [n] reach."""
    of = np.asarray(parts)
    chosen = of[np.asarray(indices, np.int64)]
    return len(np.unique(chosen)) / len(np.unique(of))
