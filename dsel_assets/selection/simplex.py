"""The nearest point whose entries are capped and add up to one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


def project_capped_simplex(v: ArrayLike, cap: float) -> Array:
    """The nearest point (Euclidean) with 0 <= s_i <= cap and sum 1, exact to float64; O(N) a pass.

    Args:
        v: [N].
        cap: at least 1/N.

    Raises:
        ValueError: v not finite, or cap below 1/N: no such point exists.
    """
    v = np.asarray(v, np.float64)
    if not np.isfinite(v).all():
        raise ValueError("the vector to be projected is not finite")
    if cap * len(v) < 1 - 1e-12:
        raise ValueError(f"{len(v)} entries of at most {cap} cannot add up to 1")
    return project(v, cap)[0]


def project(v: Array, cap: float) -> tuple[Array, float]:
    """clip(v - shift, 0, cap) of sum 1, and the shift, by Newton's method within a bracket."""
    if cap * len(v) <= 1 + 1e-12:
        return np.full(len(v), 1 / len(v)), float(v.min()) - cap
    whole = max(1, min(len(v) - 1, round(1 / cap)))
    low, high = float(v.min()) - cap, float(v.max())
    shift = float(np.partition(v, len(v) - whole)[-whole]) - cap / 2
    while True:
        s = np.clip(v - shift, 0, cap)
        excess = float(s.sum()) - 1
        if excess > 0:
            low = shift
        else:
            high = shift
        free = int(np.count_nonzero((s > 0) & (s < cap)))
        new = shift + excess / free if free else (low + high) / 2
        if not low < new < high:
            new = (low + high) / 2
        if abs(excess) <= 1e-15 or not low < new < high:
            break
        shift = new
    inside = (s > 0) & (s < cap)
    s[inside] = np.clip(s[inside] - excess / max(free, 1), 0, cap)
    return s, shift
