"""Examples chosen one after the other, each for what it takes off tr(Sigma Sigma_S^-1).

The sequential form of sketchy moment matching that its authors published as code only (SkMMv2):
first rows by random pivoting until they span the pool, then by the exact fall of the trace, the
variance of the finetuned model. No optimiser, no rounding.

In coordinates in which Sigma is the identity, with M = (sum over S of z z')^-1, the trace is
n tr M, and adding the row z takes |Mz|^2 / (1 + z'Mz) off tr M. Both terms are kept for every row;
one reading of the rows a pick brings them up to date.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_triangular
from tqdm import tqdm

from dsel_assets.selection.arrays import as_blocks
from dsel_assets.selection.moments import RANK_TOLERANCE, second_moment
from dsel_assets.selection.passes import CHUNK, chunks, compiled, share_out
from dsel_assets.selection.pivoting import Span, Urn
from dsel_assets.selection.strata import Strata

Array = NDArray[Any]

# Where ||M||^2 has fallen by this much all is computed afresh: differences lose as many digits.
FALL = 1e-6
# An example with a leverage among the chosen nearer to 1 holds a direction alone.
ESSENTIAL = 1e-9


@dataclass(frozen=True)
class Sequential:
    """What `select_sequential` returns.

    Attributes:
        indices: [n] int64, distinct, in the order of choice: what it began with, then the picks.
        widening: [n] bool, the pivots: picks that brought new directions.
        gains: [n] float64; of a pivot the share of tr Sigma that it added to the span, of another
            pick the share of tr(Sigma (n Sigma_S)^-1), as it stood after the pivots, that it took
            off. NaN for what it began with.
        trace: tr(Sigma Sigma_S^+), which sees only the span of the chosen rows.
        missed: share of tr Sigma outside the span, 0 where n and the quotas admit all directions.
        start_trace: the trace before the exchanges; NaN without a start.
        exchanges: how many.
    """

    indices: Array
    widening: Array
    gains: Array
    trace: float
    missed: float
    start_trace: float
    exchanges: int


def select_sequential(
    sketches: ArrayLike,
    n: int,
    *,
    sampler: str = "linear",
    temperature: float = 1e-3,
    block: int = 1,
    seed: int = 0,
    strata: Strata | None = None,
    required: ArrayLike = (),
    start: ArrayLike | None = None,
    worth: float = 1.0,
    moment: ArrayLike | None = None,
    progress: bool = False,
) -> Sequential:
    """Choose n examples so that tr(Sigma Sigma_S^-1) is small.

    With n below the number of directions there are only pivots, and the trace is that of the
    directions which they span. Without a start and quotas, a smaller n is a prefix of a larger.

    A start is a selection to go on from. It grows by picks, or shrinks by the examples that cost
    least, and then exchanges: adds the example that takes most off the trace and drops the one
    that then costs least, as long as this lowers the trace by more than worth/n of it, which is
    about what `worth` more examples would do. Where n is below the number of directions, what fits
    of the start is kept as it is.

    Args:
        sketches: [N, m] numpy array, also memory-mapped, or torch tensor; float32 and float64 are
            read in place. [N, k, m] where an example has k rows, which are chosen together.
            Rotating or scaling all rows changes nothing.
        n: size of the subset, 1 <= n <= N.
        sampler: how the next example is chosen by its share of all scores: "linear" draws in
            proportion, "softmax" by exp(share / temperature), "greedy" takes the first of the
            largest. The pivots of "softmax" are drawn in proportion.
        temperature: of "softmax".
        block: picks between two updates of the scores; gains are exact all the same.
        seed: of the draws.
        strata: quotas: of each part exactly its count, of sum n.
        required: [.] indices that are chosen first and never exchanged.
        start: [.] indices of an earlier selection.
        worth: how many more examples an exchange must be worth.
        moment: [m, m] Sigma, where these are only some of the pool's sketches.
        progress: show a bar.

    Raises:
        ValueError: n outside [1, N]; a block below 1; an unknown sampler; indices that repeat or
            are out of range; more required than n or a part's count; strata of another size or
            sum; sketches that are not finite or all zero.
    """
    G = as_blocks(sketches, "sketches")
    N = len(G)
    if not 1 <= n <= N:
        raise ValueError(f"n = {n}: a subset of {N} examples has between 1 and {N}")
    if block < 1:
        raise ValueError(f"block = {block} must be at least 1")
    strata = Strata.whole(N, n) if strata is None else strata
    if len(strata.of) != N or strata.n != n:
        raise ValueError(f"strata of {strata.n} of {len(strata.of)} examples, not of {n} of {N}")
    fixed = _indices(required, N, "required")
    if (np.bincount(strata.of[fixed], minlength=len(strata.counts)) > strata.counts).any():
        raise ValueError(f"{len(fixed)} examples are required, more than n or a quota allows")

    moment = second_moment(G) if moment is None else np.asarray(moment, np.float64)
    rng = np.random.default_rng([seed, 2])
    urn = Urn(strata, rng, sampler, temperature)
    span = Span(G, moment, urn)
    earlier = _indices([] if start is None else start, N, "start")
    begun = np.append(fixed, earlier[~np.isin(earlier, fixed)])
    if len(earlier):
        begun = begun[_fitting(span.white(begun), len(fixed), strata.of[begun], strata.counts)]
    if len(begun):
        urn.take(begun)
        span.cover(begun)

    chosen = begun.tolist()
    gains: dict[int, float] = {}
    with tqdm(total=n, initial=len(chosen), disable=not progress, desc="choosing") as bar:
        while len(chosen) < n and span.open:
            row = urn.draw(pivot=True)
            gains[row] = span.cover(np.array([row]))
            chosen.append(row)
            bar.update()
        pivots = list(gains)
        design = Design(G, moment, span.directions, chosen)
        whole = design.size or 1.0  # 0 where nothing but rows of zeros could be chosen
        if len(chosen) < n:
            design.weigh(urn)
        while len(design.chosen) < n:
            rows = [urn.draw() for _ in range(min(block, n - len(design.chosen)))]
            gains |= {row: fall / whole for row, fall in zip(rows, design.add(rows), strict=True)}
            bar.update(len(rows))

    before, exchanges = np.nan, 0
    if len(earlier):
        before = n * design.size
        if span.missing == 0:
            added = _exchange(design, fixed, strata.of, worth / n, rng)
            exchanges = len(added)
            gains |= {row: fall / whole for row, fall in added.items()}
    indices = np.array(design.chosen)
    return Sequential(
        indices=indices,
        widening=np.isin(indices, pivots),
        gains=np.array([gains.get(row, np.nan) for row in design.chosen]),
        trace=n * design.size,
        missed=span.missed,
        start_trace=before,
        exchanges=exchanges,
    )


class Design:
    """The moment of the chosen rows, and what each row of the pool would take off the trace.

    Attributes:
        chosen: the rows, in the order of choice.
        inverse: [d, d] float64, M.
    """

    def __init__(self, G: Array, moment: Array, directions: Array, chosen: Sequence[int]) -> None:
        """directions: [m, d], an orthonormal basis of what the chosen rows span."""
        self.chosen, self._G = list(chosen), G
        self._urn: Urn | None = None
        eigenvalues, rotation = np.linalg.eigh(directions.T @ moment @ directions)
        self._to_white = directions @ rotation / np.sqrt(eigenvalues)
        self.refresh()

    @property
    def size(self) -> float:
        """The trace over n: tr M."""
        return float(np.trace(self.inverse))

    def white(self, rows: int | Array) -> Array:
        """Rows in coordinates in which Sigma is the identity: [., k, d]."""
        found: Array = self._G[rows].astype(np.float64) @ self._to_white
        return found

    def weigh(self, urn: Urn) -> None:
        """Keep what each row would take off tr M as the scores of the urn."""
        N, k, _ = self._G.shape
        self._A, self._B, self._urn = np.empty((N, k, k)), np.empty((N, k, k)), urn
        if self._factors is None:
            self.refresh()
        else:
            self._weigh(*self._factors)

    def add(self, rows: Sequence[int]) -> list[float]:
        """Choose rows; what each, after those before it, takes off tr M."""
        self.chosen += rows
        return self._change(rows, 1.0)

    def costs_beside(self, rows: Array, white: Array, u: Array) -> Array:
        """What dropping each of these examples adds to tr M once u, as of `_step`, is in.

        rows: [c] of the pool, white: [c, k, d] the same whitened. Of A and B, which `weigh` keeps
        for all rows, no inner product with M is left to do.
        """
        v = u @ self.inverse - 0.5 * (u @ u.T) @ u
        X, W = white @ u.T, white @ v.T
        A, B = self._A[rows] - X @ X.mT, self._B[rows] - X @ W.mT - W @ X.mT
        return _costs(A, B)

    def drop(self, row: int) -> None:
        """Take a chosen row out."""
        self.chosen.remove(row)
        self._change([row], -1.0)

    def refresh(self) -> None:
        """Compute from the rows what the updates have changed step by step."""
        rows = self._G[np.array(self.chosen, np.int64)].reshape(-1, self._G.shape[2])
        white = rows.astype(np.float64) @ self._to_white
        _, lengths, rotation = np.linalg.svd(white, full_matrices=False)
        self._factors: tuple[Array, Array] | None = rotation, lengths
        self.inverse = (rotation.T / lengths**2) @ rotation
        self._fresh = np.vdot(self.inverse, self.inverse)
        if self._urn is not None:
            self._weigh(rotation, lengths)

    def _weigh(self, rotation: Array, lengths: Array) -> None:
        """A, B and the scores of all rows, from what a refresh found of the chosen."""
        to_root = self._to_white @ (rotation.T / lengths)
        for part, block in chunks(self._G):
            Y = block @ to_root
            self._A[part] = Y @ Y.mT
            Y /= lengths
            self._B[part] = Y @ Y.mT
        self._update([], [], 1.0)

    def _change(self, rows: Sequence[int], sign: float) -> list[float]:
        U, V = [], []
        for row in rows:
            u = _step(self.inverse, self.white(row), sign)
            U.append(u)
            V.append(u @ self.inverse - sign / 2 * (u @ u.T) @ u)
            self.inverse -= sign * u.T @ u
        self._factors = None
        if np.vdot(self.inverse, self.inverse) < FALL * self._fresh:
            self.refresh()
        else:
            self._update(U, V, sign)
        return [float(np.square(u).sum()) for u in U]

    def _update(self, U: list[Array], V: list[Array], sign: float) -> None:
        none = np.empty((0, len(self.inverse)))
        u, v = (np.vstack([none, *vectors]) @ self._to_white.T for vectors in (U, V))
        G, A, B, urn = self._G, self._A, self._B, self._urn
        assert urn is not None
        kept = sign, A, B, urn.open, urn.scores, urn.totals
        share_out(G, lambda start, stop: _update(G, start, stop, CHUNK, u, v, *kept))


def _step(inverse: Array, rows: Array, sign: float) -> Array:
    """With u [k, d], the inverse is M - sign u'u when the rows [k, d] come (1) or go (-1)."""
    moved = rows @ inverse
    square = np.eye(len(rows)) + sign * moved @ rows.T
    if len(rows) == 1 and square > 0:  # without two calls of LAPACK for each exchange
        return moved / np.sqrt(square)
    found: Array = solve_triangular(np.linalg.cholesky(square), moved, lower=True)
    return found


def _costs(A: Array, B: Array) -> Array:
    """What dropping each example adds to tr M; infinite if a direction is lost.

    A = ZMZ' and B = ZMMZ' of the examples Z [c, k, d]: [c, k, k].
    """
    costs = np.full(len(A), np.inf)
    left = np.eye(A.shape[1]) - A
    if A.shape[1] == 1:  # without a call of LAPACK for each
        can = left[:, 0, 0] > ESSENTIAL
        costs[can] = B[can, 0, 0] / left[can, 0, 0]
    else:
        can = np.linalg.eigvalsh(left)[:, 0] > ESSENTIAL
        costs[can] = np.linalg.solve(left[can], B[can]).trace(axis1=1, axis2=2)
    return costs


def _fitting(rows: Array, fixed: int, of: Array, counts: Array) -> Array:
    """Positions of the examples of a start [c, k, r] to go on with; the first ones are fixed.

    Of each part no more than its count, and room for the directions that they lack. The cheapest
    go first; where each holds a direction alone, the last.
    """
    kept, inverse = np.arange(len(rows)), None
    room = counts.sum() - -(-_lacking(rows) // rows.shape[1])
    while True:
        over = np.bincount(of[kept], minlength=len(counts)) > counts
        free = (kept >= fixed) & (over[of[kept]] if over.any() else len(kept) > room)
        if not free.any():
            return kept
        inverse = _inverse(rows[kept]) if inverse is None else inverse
        moved = rows[kept] @ inverse
        costs = _costs(moved @ rows[kept].mT, moved @ moved.mT)
        costs = np.where(free, costs, np.inf)
        place = int(np.argmin(costs))
        if np.isfinite(costs[place]):
            u = _step(inverse, rows[kept[place]], -1.0)
            inverse += u.T @ u
            kept = np.delete(kept, place)
        elif over.any():
            kept, inverse = np.delete(kept, np.flatnonzero(free)[-1]), None
        else:
            return kept


def _lacking(rows: Array) -> int:
    """How many directions examples [c, k, r] lack."""
    flat = rows.reshape(-1, rows.shape[2])
    spectrum = np.linalg.eigvalsh(flat.T @ flat)
    return int(np.count_nonzero(spectrum <= RANK_TOLERANCE * spectrum[-1]))


def _inverse(rows: Array) -> Array:
    """The pseudo-inverse of the moment of examples [c, k, r]."""
    _, lengths, rotation = np.linalg.svd(rows.reshape(-1, rows.shape[2]), full_matrices=False)
    there = lengths > np.sqrt(RANK_TOLERANCE) * lengths[0]
    lengths, rotation = lengths[there], rotation[there]
    return (rotation.T / lengths**2) @ rotation


def _exchange(
    design: Design, fixed: Array, of: Array, share: float, rng: np.random.Generator
) -> dict[int, float]:
    """Exchange while the trace falls by more than a share of it; what was added took off how much.

    Within parts, so that quotas stay as they are: of all parts the best exchange.
    """
    urn = Urn(Strata.whole(len(of), len(of)), rng)
    urn.take(np.array(design.chosen))
    design.weigh(urn)
    parts = np.split(np.argsort(of, kind="stable"), np.cumsum(np.bincount(of))[:-1])
    added: dict[int, float] = {}
    free = np.setdiff1d(design.chosen, fixed)
    white = design.white(free)
    while True:
        best, come, place = share * design.size, -1, -1
        for part, rows in enumerate(parts):
            inside = np.flatnonzero(of[free] == part)
            candidate = int(rows[np.argmax(urn.scores[rows])]) if len(inside) else -1
            if candidate < 0 or urn.scores[candidate] <= best:
                continue
            u = _step(design.inverse, design.white(candidate), 1.0)
            costs = design.costs_beside(free[inside], white[inside], u)
            cheapest = int(np.argmin(costs))
            net = float(np.square(u).sum() - costs[cheapest])
            if net > best:
                best, come, place = net, candidate, int(inside[cheapest])
        if come < 0:
            return added
        urn.take(np.array([come]))
        urn.put_back(int(free[place]))
        added |= dict(zip([come], design.add([come]), strict=True))
        design.drop(int(free[place]))
        free[place], white[place] = come, design.white(come)


def _indices(values: ArrayLike, size: int, name: str) -> Array:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integer indices, not {array.dtype}")
    if array.size and not (array.min() >= 0 and array.max() < size):
        raise ValueError(f"{name} must lie in [0, {size}), not {array.min()}..{array.max()}")
    if len(np.unique(array)) < array.size:
        raise ValueError(f"{name} has indices that repeat")
    return array.astype(np.int64)


@compiled
def _update(
    G: Array,
    start: int,
    stop: int,
    chunk: int,
    U: Array,
    V: Array,
    sign: float,
    A: Array,
    B: Array,
    open: Array,
    scores: Array,
    totals: Array,
) -> None:
    """A -= sign XX', B -= sign (XW' + WX') for X = GU', W = GV', and the scores."""
    k, q = G.shape[1], U.shape[0]
    X, W, work = np.empty((k, q)), np.empty((k, q)), np.empty((k + 1, k))
    for first in range(start, stop, chunk):
        total = 0.0
        for i in range(first, min(first + chunk, stop)):
            if k == 1:  # the loops over one element would take longer than the reading
                a = b = 0.0
                for j in range(q):
                    x, w = _two(G, i, 0, U, V, j)
                    a += x * x
                    b += x * w
                A[i, 0, 0] -= sign * a
                B[i, 0, 0] -= sign * 2.0 * b
                fall = B[i, 0, 0] / (1.0 + max(A[i, 0, 0], 0.0))
            else:
                for r in range(k):
                    for j in range(q):
                        X[r, j], W[r, j] = _two(G, i, r, U, V, j)
                for r in range(k):
                    for s in range(r + 1):
                        a = b = 0.0
                        for j in range(q):
                            a += X[r, j] * X[s, j]
                            b += X[r, j] * W[s, j] + W[r, j] * X[s, j]
                        A[i, r, s] -= sign * a
                        B[i, r, s] -= sign * b
                        A[i, s, r], B[i, s, r] = A[i, r, s], B[i, r, s]
                fall = _fall(A, B, i, work)
            scores[i] = max(fall, 0.0) if open[i] else 0.0
            total += scores[i]
        totals[first // chunk] = total


@compiled
def _two(G: Array, i: int, r: int, U: Array, V: Array, j: int) -> tuple[float, float]:
    """Inner products of one row with one row of U and of V."""
    x = w = 0.0
    for c in range(G.shape[2]):
        value = np.float64(G[i, r, c])
        x += value * U[j, c]
        w += value * V[j, c]
    return x, w


@compiled
def _fall(A: Array, B: Array, i: int, work: Array) -> float:
    """tr((I + A)^-1 B) of example i, by Cholesky; work is [k + 1, k]."""
    k = A.shape[1]
    L, y = work[:k], work[k]
    for r in range(k):
        for s in range(r + 1):
            left = A[i, r, s]
            for c in range(s):
                left -= L[r, c] * L[s, c]
            L[r, s] = np.sqrt(left + 1.0) if r == s else left / L[s, s]
    total = 0.0
    for s in range(k):
        for r in range(k):
            left = B[i, r, s]
            for c in range(r):
                left -= L[r, c] * y[c]
            y[r] = left / L[r, r]
        for r in range(k - 1, s - 1, -1):
            left = y[r]
            for c in range(r + 1, k):
                left -= L[c, r] * y[c]
            y[r] = left / L[r, r]
        total += y[s]
    return total
