"""ITL: greedy choice of the candidates that say most about a set of targets.

J. Hübotter, B. Sukhija, L. Treven, Y. As, A. Krause, "Transductive Active Learning: Theory and
Applications", NeurIPS 2024, arXiv:2402.15898.

The rows are features of a Gaussian process with a linear kernel: f(x) = <theta, x>,
theta ~ N(0, I), observed with Gaussian noise. No label is needed to know how far an observation
will reduce the uncertainty about the targets, so the whole choice can be made beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsel_assets.data.examples import Examples
from dsel_assets.selection.arrays import as_rows
from dsel_assets.selection.interface import Choice, Needs, Selector, State

Array = NDArray[Any]

RULES = ("itl", "vtl")
FORMS = ("paper", "library")

FACTOR_BYTES = 2 << 30
BLOCK_ROWS = 8192


@dataclass(frozen=True)
class Informative:
    """What `select_informative` returns; n picks, m targets.

    Attributes:
        indices: [n] int64, rows of the candidates, distinct, in the order of choice.
        gains: [n] float64, nats of information that each pick adds about the targets.
        target_variance: [n, m] float64, variance of f at each target after each pick.
        state: what a later call needs to go on from here.
    """

    indices: Array
    gains: Array
    target_variance: Array
    state: State


def select_informative(
    candidates: ArrayLike,
    targets: ArrayLike,
    n: int,
    *,
    rule: str = "itl",
    form: str = "paper",
    noise: float | None = None,
    taken: ArrayLike | None = None,
    state: State | None = None,
) -> Informative:
    """Choose n candidates, one after the other, that say most about f at the targets.

    ITL takes the candidate x with the largest information gain I(y_A; y_x | picks) about noisy
    observations of the targets A (eq. 44); VTL the one that most reduces their summed variance.
    The choice is the exact greedy one over all candidates; a smaller n is a prefix of a larger.
    Equal scores go to the lowest index. Rows are used as given: centring or scaling them to unit
    norm beforehand changes the choice. Half precision is computed in single precision, and all
    that accumulates over the picks in double.

    Args:
        candidates: [N, d] numpy array or torch tensor.
        targets: [m, d].
        n: number of picks.
        rule: "itl" or "vtl".
        form: the ITL ratio of variances before and after seeing the targets: "paper" adds the
            noise to both; "library" (what the authors' package `activeft` computes) adds it to
            neither, which ignores the candidates' norms. Both decide the gains reported.
        noise: variance of the observation noise, in squared units of the rows; by default the
            mean squared norm of the candidates.
        taken: indices of candidates that must not be picked.
        state: of an earlier call on the same candidates, targets and noise. Its picks count as
            observed and are not picked again, so that 50 picks and then 50 more are the same
            100 as in one call.

    Raises:
        ValueError: unknown rule or form, empty or mis-shaped arrays, rows that are not finite,
            indices out of range, more picks than candidates, or a state of other data.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; the rules are {', '.join(RULES)}")
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; the forms are {', '.join(FORMS)}")
    X, T = as_rows(candidates, "candidates"), as_rows(targets, "targets").astype(np.float64)
    if X.shape[1] != T.shape[1]:
        raise ValueError(f"candidates have {X.shape[1]} features but targets {T.shape[1]}")
    norms = _squared_norms(X)
    noise = float(norms.mean() if noise is None else noise)
    if not 0 < noise < np.inf:
        raise ValueError(f"noise = {noise}: the noise variance must be positive and finite")

    identity = {"candidates": _digest(X), "targets": _digest(T), "noise": np.array(noise)}
    if state is not None:
        for name, value in identity.items():
            if not np.array_equal(state[name], value):
                raise ValueError(f"the state belongs to another choice: its {name} differ")
    before = np.empty(0, np.int64) if state is None else state["picks"]
    blocked = np.zeros(len(X), dtype=bool)
    blocked[before] = True
    blocked[_indices(taken, len(X))] = True
    available = len(X) - np.count_nonzero(blocked)
    if not 0 <= n <= available:
        raise ValueError(f"n = {n} picks from {available} candidates that may be picked")

    indices, gains, variance = _greedy(X, norms, T, X[before], blocked, n, rule, form, noise)
    picks = np.concatenate([before, indices])
    return Informative(indices, gains, variance, {"picks": picks, **identity})


def _greedy(
    X: Array,
    norms: Array,
    T: Array,
    observed: Array,
    blocked: Array,
    n: int,
    rule: str,
    form: str,
    noise: float,
) -> tuple[Array, Array, Array]:
    rows = 2 * (len(observed) + n) + len(T)
    factored = rule == "itl" and rows < X.shape[1] and 8 * rows * len(X) <= FACTOR_BYTES
    prior = _Posterior(X, norms, observed, noise, n, factored)
    # VTL scores with the first process alone: the second then follows no candidates.
    followed = slice(None if rule == "itl" else 0)
    seen = np.concatenate([T, observed])
    informed = _Posterior(X[followed], norms[followed], seen, noise, n, factored)
    added = noise if form == "paper" else 0.0
    floor = max(1e-12 * norms.mean(), np.finfo(float).tiny)

    def ratio(before: Any, after: Any) -> Any:
        after = np.maximum(after, floor) + added
        return np.maximum(before + added, after) / after

    target_variance = _squared_norms(T) - _squared_norms(T, prior.B)
    if rule == "vtl":
        covariance = T - (T @ prior.B.T) @ prior.B
        q = np.concatenate([((b @ covariance.T) ** 2).sum(1) for b in _blocks(X)])

    indices = np.empty(n, np.int64)
    gains = np.empty(n)
    variances = np.empty((n, len(T)))
    nearly = 1 - 64 * np.finfo(X.dtype).eps
    for i in range(n):
        if rule == "itl":
            score = ratio(prior.variance, informed.variance)
        else:
            score = q / (prior.variance + noise)
        score[blocked] = -1.0
        p = int(np.argmax(score >= nearly * score.max()))
        indices[i], blocked[p] = p, True

        x = X[p].astype(np.float64)
        column = X @ X[p] if factored else None
        variance, b, f = prior.observe(x, column)
        gains[i] = 0.5 * np.log(ratio(variance, informed.observe(x, column)[0]))
        g = T @ b
        target_variance = target_variance - g**2
        variances[i] = target_variance
        if rule == "vtl":
            # q_j = sum_t k(x_j, t)^2, and k(x_j, t) has just dropped by f_j g_t
            w = prior.covariance(T.T @ g) + b * (g @ g)
            q = np.maximum(q + f * (f * (g @ g) - 2 * (X @ w.astype(X.dtype))), 0.0)
    return indices, gains, np.maximum(variances, 0.0)


class _Posterior:
    """A Gaussian process that has observed some rows, and its variance at the candidates.

    The covariance of theta is I - B'B. Observing x appends the row b = Sx / sqrt(x'Sx + noise) to
    B and lowers the variance of candidate j by <x_j, b>^2. The factored form keeps F = B X' and
    gets the new row of it from the prior column X x, which two processes can share.
    """

    def __init__(
        self, X: Array, norms: Array, observed: Array, noise: float, steps: int, factored: bool
    ) -> None:
        _, sigma, rows = np.linalg.svd(observed.astype(np.float64), full_matrices=False)
        self.X, self.noise, self.size = X, noise, len(sigma)
        self._B = np.empty((self.size + steps, X.shape[1]))
        self._B[: self.size] = (sigma / np.sqrt(sigma**2 + noise))[:, None] * rows
        self._F: Array | None = None
        if factored:
            self._F = np.empty((len(self._B), len(X)), X.dtype)
            self._F[: self.size] = self.B.astype(X.dtype) @ X.T
        self.variance = norms - _squared_norms(X, self.B)

    @property
    def B(self) -> Array:  # noqa: N802
        return self._B[: self.size]

    def covariance(self, w: Array) -> Array:
        """S w, for the covariance S of theta."""
        explained: Array = (self.B @ w) @ self.B
        return w - explained

    def observe(self, x: Array, column: Array | None) -> tuple[float, Array, Array]:
        """Observe a row; its variance until now, the direction b and X b."""
        weights = self.B @ x
        u = x - weights @ self.B
        variance = float(x @ u)
        root = np.sqrt(max(variance, 0.0) + self.noise)
        b = u / root
        if self._F is None or column is None:
            f = self.X @ b.astype(self.X.dtype)
        else:
            f = (column - weights.astype(self.X.dtype) @ self._F[: self.size]) / root
            self._F[self.size] = f
        self._B[self.size] = b
        self.size += 1
        self.variance -= f.astype(np.float64) ** 2
        return variance, b, f


def _indices(values: ArrayLike | None, size: int) -> Array:
    array = np.asarray([] if values is None else values)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"taken must be integer indices, not {array.dtype}")
    if array.size and not (array.min() >= 0 and array.max() < size):
        raise ValueError(f"taken must lie in [0, {size}), not {array.min()}..{array.max()}")
    return array.astype(np.int64)


def _blocks(X: Array) -> Iterator[Array]:
    for start in range(0, len(X), BLOCK_ROWS):
        yield X[start : start + BLOCK_ROWS]


def _squared_norms(X: Array, B: Array | None = None) -> Array:
    """Squared norms [N], in float64, of the rows of X, or of X B'."""
    return np.concatenate(
        [
            ((rows if B is None else rows @ B.T.astype(X.dtype)).astype(np.float64) ** 2).sum(1)
            for rows in _blocks(X)
        ]
        or [np.empty(0)]
    )


def _digest(X: Array) -> Array:
    digest = blake2b(f"{X.shape} {X.dtype}".encode(), digest_size=16)
    digest.update(X.data)
    return np.frombuffer(digest.digest(), np.uint8)


class Itl(Selector):
    """ITL on gradient sketches, centred on the pool and scaled to unit norm.

    Centring takes out the direction that all gradients share, unit norm the bias towards examples
    with large gradients, among them those with wrong labels. The choice is exact: no seed enters.
    """

    name = "itl"
    version = 1
    needs = Needs.SKETCHES | Needs.TARGET | Needs.LABELS
    deterministic = True

    def __init__(self, *, form: str = "paper", noise: float | None = None) -> None:
        self.form, self.noise = form, noise

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """The n picks in order, with the gain of each and the target example nearest to it."""
        assert target is not None and pool.sketches is not None and target.sketches is not None
        centre = pool.sketches.mean(0, dtype=np.float64)
        candidates, targets = (
            _directions(pool.sketches, centre),
            _directions(target.sketches, centre),
        )
        # equal rows say nothing and have no norm to take the noise from: any noise will do
        noise = self.noise if self.noise or candidates.any() else 1.0
        found = select_informative(candidates, targets, n, form=self.form, noise=noise)
        cosines = candidates[found.indices] @ targets.T
        nearest = cosines.argmax(1)
        return Choice(
            found.indices,
            {
                "gain": found.gains,
                "nearest_target": target.ids[nearest],
                "nearest_cosine": cosines.max(1).astype(np.float64),
            },
            {
                "information_nats": float(found.gains.sum()),
                "target_variance_left": float(found.target_variance[-1].mean()),
                "worst_target_variance_left": float(found.target_variance[-1].max()),
            },
        )


def _directions(rows: Array, centre: Array) -> Array:
    moved = (rows - centre).astype(np.float32)
    norms = np.linalg.norm(moved, axis=1, keepdims=True)
    return moved / np.where(norms > 0, norms, 1)
