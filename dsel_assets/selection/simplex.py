"""The nearest weights that are capped and add up to given sums, over a whole or over its parts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsel_assets.selection.strata import Strata

Array = NDArray[Any]

ROUNDING = 1e-14  # relative error of a sum that is left to the last correction


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
    return CappedSimplices(cap, np.zeros(len(v), np.int64), np.ones(1)).project(v)[0]


class CappedSimplices:
    """All weights s with 0 <= s_i <= cap whose sum over each part of the rows is given.

    cap     a number
    of      [N] int64, the part of each row
    totals  [K] float64, the sum over each part, at most cap times its size
    """

    def __init__(self, cap: float, of: Array, totals: Array) -> None:
        self.cap, self.of, self.totals = cap, of, totals
        self.sizes = np.bincount(of, minlength=len(totals))

    @classmethod
    def of_strata(cls, strata: Strata) -> CappedSimplices:
        """The weights of sum 1 under which n s_i can be the probability of choosing row i."""
        return cls(1 / strata.n, strata.of, strata.counts / strata.n)

    def sums(self, v: Array) -> Array:
        """[K] the sum of v [N] over each part."""
        return np.bincount(self.of, v, len(self.totals))

    def project(self, v: Array) -> tuple[Array, Array]:
        """The nearest s [N] to v [N], and the shift [K] of each part: s = clip(v - shift, 0, cap).

        Newton's method for every part at once, each within a bracket.
        """
        low = np.full(len(self.totals), v.min() - self.cap)
        high = np.full(len(self.totals), v.max())
        shift = (self.sums(v) - self.totals) / np.maximum(self.sizes, 1)  # if none were at a bound
        shift = np.where(self.totals < self.sizes * self.cap, shift, low)
        shift = np.where(self.totals > 0, shift, high)
        last = np.inf
        while True:
            s = np.clip(v - shift[self.of], 0, self.cap)
            inside = (s > 0) & (s < self.cap)
            free = np.maximum(self.sums(inside), 1)
            excess = self.sums(s) - self.totals
            low, high = np.where(excess > 0, shift, low), np.where(excess > 0, high, shift)
            new = shift + excess / free
            fast = (low < new) & (new < high) & (np.abs(excess) < last / 2)
            new = np.where(fast, new, (low + high) / 2)
            going = (np.abs(excess) > ROUNDING * self.totals) & (low < new) & (new < high)
            if not going.any():
                break
            shift, last = np.where(going, new, shift), np.abs(excess)
        s[inside] = np.clip(s[inside] - (excess / free)[self.of[inside]], 0, self.cap)
        return s, shift

    def greatest(self, v: Array) -> float:
        """The largest s'v: in each part, as many of the largest entries as the caps allow.

        Each total must be a multiple of the cap.
        """
        whole = np.rint(self.totals / self.cap).astype(np.int64)
        order = np.lexsort((v, self.of))
        first = np.cumsum(self.sizes) - whole
        taken = order[np.arange(len(v)) >= np.repeat(first, self.sizes)]
        return float(v[taken].sum()) * self.cap
