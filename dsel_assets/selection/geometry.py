"""The baselines of SkMM's authors: where an example lies among the others, and no more.

As in Y. Dong, H. Phan, X. Pan, Q. Lei, "Sketchy Moment Matching", NeurIPS 2024, arXiv:2407.06120:
k-center, herding, adaptive sampling and leverage scores, on gradient sketches [N, m] (or [N, k, m],
k rows an example). Each reads the sketches about once a pick.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsel_assets.data.examples import Examples
from dsel_assets.selection.arrays import as_blocks, as_rows
from dsel_assets.selection.interface import Choice, Selector, State
from dsel_assets.selection.moments import intrinsic_dimension, second_moment
from dsel_assets.selection.passes import products
from dsel_assets.selection.pivoting import Span, Urn
from dsel_assets.selection.rounding import round_weights
from dsel_assets.selection.strata import Strata
from dsel_assets.selection.strategies import STRATEGIES

Array = NDArray[Any]


def k_center(sketches: ArrayLike, n: int, *, seed: int = 0) -> tuple[Array, Array]:
    """Greedy k-center (T. Gonzalez, TCS 1985): the first at random, then always the farthest.

    Returns:
        indices [n] in the order of choice, and how far [n] each was from those before it (the
        first: how far the farthest is from it).
    """
    rows = as_rows(sketches, "sketches")
    squares = _squared_norms(rows)
    nearest = np.full(len(rows), np.inf)
    picks, radii = np.empty(n, np.int64), np.empty(n)
    next_one = int(np.random.default_rng(seed).integers(len(rows)))
    for i in range(n):
        picks[i], radii[i] = next_one, np.sqrt(nearest[next_one])
        inner = products(rows[:, None], rows[next_one : next_one + 1].astype(np.float64))[:, 0, 0]
        nearest = np.minimum(nearest, np.maximum(squares - 2 * inner + squares[next_one], 0))
        if i == 0:
            radii[0] = np.sqrt(nearest.max())
        nearest[picks[: i + 1]] = -1.0  # equal rows are at 0, and may come when nothing else does
        next_one = int(np.argmax(nearest))
        nearest[picks[: i + 1]] = 0.0
    return picks, radii


def herding(
    sketches: ArrayLike, n: int, *, form: Literal["original", "published"] = "original"
) -> Array:
    """Herding: examples whose running mean follows the pool's.

    Args:
        sketches: see the module.
        n: how many.
        form: "original" (M. Welling, ICML 2009): the largest inner product with what the sum of the
            picks lacks, (i + 1) mean - sum. "published": the example farthest from that point, as
            the code of SkMM's authors and DeepCore have it, which is no herding.

    Returns:
        [n] indices in the order of choice.
    """
    if form not in ("original", "published"):
        raise ValueError(f"unknown form {form!r}; there are original, published")
    rows = as_rows(sketches, "sketches")
    mean = rows.mean(0, dtype=np.float64)
    # of the point (i + 1) mean - sum only inner products are needed
    toward, taken = products(rows[:, None], mean[None])[:, 0, 0], np.zeros(len(rows))
    squares = _squared_norms(rows) if form == "published" else None
    free, picks = np.ones(len(rows), dtype=bool), np.empty(n, np.int64)
    for i in range(n):
        lacking = (i + 1) * toward - taken
        score = lacking if squares is None else squares - 2 * lacking
        pick = int(np.argmax(np.where(free, score, -np.inf)))
        picks[i], free[pick] = pick, False
        taken += products(rows[:, None], rows[pick : pick + 1].astype(np.float64))[:, 0, 0]
    return picks


def adaptive(sketches: ArrayLike, n: int, *, seed: int = 0) -> Array:
    """Adaptive sampling, or random pivoting: drawn by what the picks before do not span.

    Once they span everything it starts anew with the examples that are left.

    Returns:
        [n] indices in the order of choice.
    """
    blocks = as_blocks(sketches, "sketches")
    urn = Urn(Strata.whole(len(blocks), n), np.random.default_rng(seed))
    sigma = second_moment(blocks)
    span = Span(blocks, sigma, urn)
    picks = np.empty(n, np.int64)
    for i in range(n):
        if not span.open:
            span = Span(blocks, sigma, urn)
        picks[i] = urn.draw(pivot=True)
        span.cover(picks[i : i + 1])
    return picks


def leverage(sketches: ArrayLike, *, rank: int | None = None, ridge: float | None = None) -> Array:
    """Leverage scores [N]: how much of its own direction an example holds.

    Args:
        sketches: see the module.
        rank: truncated: in the space of so many leading directions.
        ridge: of all directions, g' (G'G + ridge I)^-1 g, in the squared unit of the sketches.
            With neither, the rank is the pool's intrinsic dimension.
    """
    blocks = as_blocks(sketches, "sketches")
    values, vectors = np.linalg.eigh(second_moment(blocks) * len(blocks))
    if ridge is None:
        size = intrinsic_dimension(values, len(blocks)) if rank is None else rank
        values, vectors = values[-size:], vectors[:, -size:]
    held = values + (ridge or 0.0)
    present = held > 1e-12 * held[-1]
    inner = products(blocks, (vectors[:, present] / np.sqrt(held[present])).T)
    scores: Array = np.square(inner).sum((1, 2))
    return scores


def _squared_norms(rows: Array) -> Array:
    found: Array = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    return found


class KCenter(Selector):
    """Greedy k-center: covers the pool, outliers first."""

    traits = STRATEGIES["kcenter"]

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """The n picks in order, with their distance to those before."""
        assert pool.sketches is not None
        rows, radii = k_center(pool.sketches, n, seed=seed)
        return Choice(rows, {"distance": radii}, {"radius": float(radii[-1])})


class Herding(Selector):
    """Herding: follows the mean of the pool."""

    traits = STRATEGIES["herding"]

    def __init__(self, *, form: Literal["original", "published"] = "original") -> None:
        self.form = form

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """The n picks in order, with how far their mean is from the pool's."""
        assert pool.sketches is not None
        rows = herding(pool.sketches, n, form=self.form)
        sketches = as_rows(pool.sketches, "sketches")
        mean, chosen = (part.mean(0, dtype=np.float64) for part in (sketches, sketches[rows]))
        off = float(np.linalg.norm(mean - chosen) / np.linalg.norm(mean))
        return Choice(rows, diagnostics={"mean_off": off})


class Adaptive(Selector):
    """Adaptive sampling by what is not spanned yet."""

    traits = STRATEGIES["adaptive"]

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """The n picks in order."""
        assert pool.sketches is not None
        return Choice(adaptive(pool.sketches, n, seed=seed))


class Leverage(Selector):
    """Sampling without replacement in proportion to leverage scores."""

    traits = STRATEGIES["leverage"]

    def __init__(self, *, ridge: float | None = None) -> None:
        self.ridge = ridge

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """The draw, with the scores; a ridge counts in units of the Gram's mean eigenvalue."""
        assert pool.sketches is not None
        sketches = as_rows(pool.sketches, "sketches")
        unit = float(_squared_norms(sketches).sum()) / sketches.shape[1]
        ridge = None if self.ridge is None else self.ridge * unit
        scores = leverage(pool.sketches, ridge=ridge)
        # who has none may still be needed to fill the budget
        floor = 1e-9 * scores.max()
        rows = round_weights(np.maximum(scores, floor or 1.0), n, seed=seed)
        return Choice(
            rows, {"leverage": scores[rows]}, {"mean_leverage": float(scores[rows].mean())}
        )
