"""From weights to a subset: n distinct examples drawn by their probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]

ROUNDINGS = ("sample", "systematic")


def round_weights(weights: ArrayLike, n: int, *, rule: str = "sample", seed: int = 0) -> Array:
    """Draw n distinct examples according to their weights.

    Never the n largest: weights within a cluster tie, and the order of ties would decide.

    Args:
        weights: [N] s >= 0; scaled to sum 1.
        n: how many.
        rule: "sample" draws one after the other without replacement, each with probability
            proportional to s; a smaller n is a prefix. "systematic" includes example i with
            probability n s_i exactly, which must not exceed 1.
        seed: of the draw.

    Returns:
        [n] int64, in the order of the draw.

    Raises:
        ValueError: unknown rule, negative or non-finite weights, fewer than n of them positive, or
            n s_i above 1 under "systematic".
    """
    if rule not in ROUNDINGS:
        raise ValueError(f"unknown rule {rule!r}; the rules are {', '.join(ROUNDINGS)}")
    s = np.asarray(weights, np.float64)
    if s.ndim != 1 or not (np.isfinite(s).all() and (s >= 0).all()):
        raise ValueError("weights must be a vector of finite numbers that are not negative")
    if not 0 <= n <= np.count_nonzero(s):
        raise ValueError(f"n = {n} of {np.count_nonzero(s)} examples with a positive weight")
    rng = np.random.default_rng([seed, 1])
    if rule == "sample" or n == 0:
        # Efraimidis and Spirakis: the n smallest of independent exponentials with rates s
        positive = np.flatnonzero(s)
        waiting = rng.exponential(size=len(s))[positive] / s[positive]
        first: Array = np.argsort(waiting, kind="stable")[:n]
        return positive[first]
    inclusion = s * (n / s.sum())
    if inclusion.max() > 1 + 1e-9:
        raise ValueError(f"n s_i = {inclusion.max():.6g} > 1 is no probability of inclusion")
    order = rng.permutation(len(s))
    passed = np.cumsum(inclusion[order])
    points = (rng.random() + np.arange(n)) * (passed[-1] / n)
    drawn: Array = order[np.searchsorted(passed, points, side="right")]
    return drawn
