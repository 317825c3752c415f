"""The convex problem of SkMM: weights under which a subset's second moment matches the pool's.

Sections, equations and symbols are those of Y. Dong, H. Phan, X. Pan, Q. Lei, "Sketchy Moment
Matching", NeurIPS 2024, arXiv:2407.06120.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_triangular
from scipy.optimize import nnls
from scipy.sparse import csr_array
from tqdm import tqdm

from dsel_assets.selection import arrays
from dsel_assets.selection.moments import RANK_TOLERANCE, second_moment
from dsel_assets.selection.simplex import CappedSimplices
from dsel_assets.selection.strata import Strata

Array = NDArray[Any]

log = logging.getLogger(__name__)

NEWTON_STEPS = 40  # of one proximal problem
IDLE = 10  # proximal problems without progress after which arithmetic is at its end
PATIENCE = 3  # Newton steps without progress where values are nothing but rounding
ROUNDING = 500 * float(np.finfo(np.float64).eps)  # of a dual's value, of its largest term
SAME = 1e-6  # squared coordinates that differ by less, of the largest eigenvalue, are the same


@dataclass(frozen=True)
class MomentMatch:
    """What `match_moments` returns.

    Attributes:
        weights: [N] float64 s, 0 <= s <= 1/n, of sum 1.
        objective: ||P's - gamma * lambda||^2 at s and its best gamma, in the fourth power of the
            unit of the sketches.
        optimality: bound on how far the objective lies above its minimum (duality gap), divided by
            the objective at s = 1/N, gamma = 1/c.
        iterations: Newton steps taken, each O(N m) and O(m^2) a row strictly between 0 and 1/n.
        gamma: [r] float64 >= 1/c, the achieved P's / lambda where it exceeds 1/c.
        eigenvalues: [r] float64 lambda, ascending, of the r directions that the pool spans.
        prices: [r] float64 u >= 0, in the squared unit of the sketches, which prove the optimality:
            no weights have an objective below u'lambda/c - ||u||^2/4 - max_s u'P's.
    """

    weights: Array
    objective: float
    optimality: float
    iterations: int
    gamma: Array
    eigenvalues: Array
    prices: Array

    @property
    def support(self) -> float:
        """Effective number of examples that share the weight, 1 / ||s||^2, at least n."""
        return 1 / float(self.weights @ self.weights)


def match_moments(
    sketches: ArrayLike,
    n: int,
    *,
    c: float = 0.999,
    tol: float = 1e-6,
    seed: int = 0,
    max_iterations: int = 2000,
    strata: Strata | None = None,
    start: ArrayLike | None = None,
    moment: ArrayLike | None = None,
    progress: bool = False,
) -> MomentMatch:
    """Probabilities s with which n of N examples match the pool's moment in its eigenbasis.

    Minimises ||P's - gamma * lambda||^2 over 0 <= s <= 1/n, sum s = 1 and gamma >= 1/c, where
    P_ij = (GV)_ij^2 (the relaxation of Sigma <= c Sigma_S to the diagonal in the basis V). The
    best gamma is max(1/c, P's / lambda), which leaves F(s) = ||min(0, P's - lambda/c)||^2: convex,
    but so flat that gradient methods stall. The proximal point method turns it into problems in
    m dual variables, each solved by a few Newton steps. Of the many solutions the one found lies
    near the start.

    Sketches are read in chunks and may lie on disk. Memory: P, N r numbers of the precision of the
    sketches (float32 at least), and a few vectors; every sum is taken in float64.

    Args:
        sketches: [N, m] or [N, k, m] (k rows an example, whose squares add up), numpy or torch;
            only their directions and relative lengths matter.
        n: size of the subset, 1 <= n <= N.
        c: the bound on c_S asked for, below 1.
        tol: stops when the optimality is this small.
        seed: draws the n examples that have weight 1/n at the start, where none is given.
        max_iterations: bound on the Newton steps; a warning tells when it ends the work.
        strata: quotas: the sum of s over each part is its share of n.
        start: [N] weights to stay near, as of an earlier solution with 0 for new examples; the
            nearest feasible ones are the start.
        moment: [m, m] of the pool, where these are only some of its sketches.
        progress: show a bar.

    Raises:
        ValueError: n outside [1, N], c or tol not positive, sketches that are not finite or are
            all zero, strata or a start that do not fit.
    """
    blocks = arrays.as_blocks(sketches, "sketches")
    N = len(blocks)
    if not 1 <= n <= N:
        raise ValueError(f"n = {n}: a subset of {N} examples has between 1 and {N}")
    if not (c > 0 and tol > 0):
        raise ValueError(f"c = {c} and tol = {tol} must be positive")
    strata = Strata.whole(N, n) if strata is None else strata
    if strata.n != n or len(strata.of) != N:
        raise ValueError(
            f"strata of {len(strata.of)} examples, {strata.n} to choose, for n = {n} of {N}"
        )
    feasible = CappedSimplices.of_strata(strata)
    s = _start(N, n, seed) if start is None else np.asarray(start, np.float64)
    if s.shape != (N,) or not np.isfinite(s).all():
        raise ValueError(f"start has shape {s.shape}; it must be one finite weight for each of {N}")

    P, mean, unit = energies(blocks, None if moment is None else np.asarray(moment, np.float64))
    target = mean / c
    problem = _Problem(P, target, feasible)
    _warn(problem, blocks.shape, n, c)
    # At c = 1 uniform weights are optimal and the reference would be 0.
    reference = float(target @ target) * max((1 - c) ** 2, 1e-12)
    with tqdm(desc="moments", unit="step", leave=False, disable=not progress) as bar:
        best, prices, bound, iterations = _proximal_point(
            problem, feasible.project(s)[0], tol * reference, max_iterations, bar
        )
    optimality = max(best.objective - bound, 0.0) / reference
    log.info("moments matched: %d iterations, optimality %.2g", iterations, optimality)
    if optimality > tol:
        warnings.warn(
            f"stopped after {iterations} iterations at optimality {optimality:.2g} > {tol:.2g}",
            stacklevel=2,
        )
    return MomentMatch(
        weights=best.s,
        objective=best.objective * unit**2,
        optimality=optimality,
        iterations=iterations,
        gamma=np.maximum(1 - best.shortfall / target, 1) / c,
        eigenvalues=mean * unit,
        prices=prices * unit,
    )


def energies(blocks: Array, moment: Array | None = None) -> tuple[Array, Array, float]:
    """Squared coordinates of examples [N, k, m] in the eigenbasis of a second moment, their own.

    Returns:
        P [N, r] in units of the largest eigenvalue and the dtype of the blocks, the eigenvalues
        [r] in float64, ascending, in that unit (of their own moment they are P's mean, as
        rounded), and the unit.

    Raises:
        ValueError: all zero.
    """
    eigenvalues, V = np.linalg.eigh(second_moment(blocks) if moment is None else moment)
    unit = float(eigenvalues[-1])
    if not unit > 0:
        raise ValueError("the sketches are all zero: there is no moment to match")
    present = eigenvalues > RANK_TOLERANCE * unit
    V = V[:, present] / np.sqrt(unit)
    P = np.empty((len(blocks), V.shape[1]), blocks.dtype)
    total, done = np.zeros(V.shape[1]), 0
    for part in arrays.chunks(blocks):
        into = P[done : done + len(part)]
        into[:] = np.square(part.astype(np.float64) @ V).sum(1)
        total += into.sum(0, dtype=np.float64)
        done += len(part)
    return P, total / len(P) if moment is None else eigenvalues[present] / unit, unit


def _start(N: int, n: int, seed: int) -> Array:
    """1/n on n random examples."""
    s = np.zeros(N)
    s[np.random.default_rng([seed, 0]).choice(N, n, replace=False)] = 1 / n
    return s


def _warn(problem: _Problem, shape: tuple[int, ...], n: int, c: float) -> None:
    """Tell what no weights can mend."""
    N, k, m = shape
    r = len(problem.target)
    if all(np.ptp(np.vstack([part, problem.P[:1]]), 0).max() < SAME for part in problem.parts()):
        _say("all examples have the same moment: any choice of them matches the pool's as well")
        return
    if r < m:
        _say(f"{m - r} of {m} directions are left out: next to no energy lies in them")
    if r > n * k:
        _say(
            f"{n} examples span at most {n * k} of {r} directions: those drawn by these weights "
            "leave some of the pool's out; reduce the sketches first, by `reduce_sketches`"
        )
    if c >= 1:
        _say(f"c = {c} >= 1: uniform weights are already optimal")
    elif n < N:
        norms = problem.values(np.ones(r))
        least = float(norms.mean()) / problem.feasible.greatest(norms)
        if least > c:
            _say(
                f"c = {c} is out of reach: no {n} examples have c_S below {least:.6g}, the ratio "
                "of the pool's mean squared norm to theirs (1 if all norms are equal)"
            )


def _say(what: str) -> None:
    warnings.warn(what, stacklevel=4)


@dataclass(frozen=True)
class _Problem:
    """Minimise F(s) = ||max(0, target - P's)||^2 over the feasible s.

    Its dual is D(u) = u'target - ||u||^2 / 4 - max_s u'P's over u >= 0.
    """

    P: Array
    target: Array
    feasible: CappedSimplices

    def values(self, u: Array) -> Array:
        """P u [N]."""
        return np.concatenate([part @ u for part in self.parts()])

    def shortfall(self, s: Array) -> Array:
        """Target - P's [r]."""
        left = self.target.copy()
        for rows, part in self.parts_of(s > 0):
            left -= s[rows] @ part
        return left

    def bound(self, u: Array, values: Array) -> float:
        """D(u), which no F(s) is below; values: P u."""
        return float(u @ self.target - u @ u / 4 - self.feasible.greatest(values))

    def scatter(self, free: Array) -> Array:
        """Scatter matrix [r, r] of the free rows about their mean in each part."""
        r, of = len(self.target), self.feasible.of
        total, sums = np.zeros((r, r)), np.zeros((len(self.feasible.totals), r))
        origin = None
        for rows, part in self.parts_of(free):
            # Rows far from zero and near each other would cancel.
            origin = part.mean(0) if origin is None else origin
            part -= origin
            total += part.T @ part
            entries = np.ones(len(rows)), of[rows], np.arange(len(rows) + 1)
            sums += csr_array(entries, (len(rows), len(sums))).T @ part
        sizes = np.maximum(self.feasible.sums(free), 1)
        return total - sums.T @ (sums / sizes[:, None])

    def parts(self) -> Iterator[Array]:
        """P in double precision, some rows at a time."""
        for part in arrays.chunks(self.P):
            yield part.astype(np.float64, copy=False)

    def parts_of(self, chosen: Array) -> Iterator[tuple[Array, Array]]:
        """Some of the rows in which `chosen` [N] is true at a time, and a copy of P's in double."""
        rows, at_once = np.flatnonzero(chosen), max(1, arrays.CHUNK // len(self.target))
        for first in range(0, len(rows), at_once):
            some = rows[first : first + at_once]
            yield some, self.P[some].astype(np.float64)


@dataclass(frozen=True)
class _Point:
    """Weights s with target - P's, and prices u with P u."""

    s: Array
    shortfall: Array
    u: Array
    values: Array

    @property
    def objective(self) -> float:
        lacking = np.maximum(self.shortfall, 0)
        return float(lacking @ lacking)


def _proximal_point(
    problem: _Problem, s: Array, goal: float, max_iterations: int, bar: tqdm
) -> tuple[_Point, Array, float, int]:
    """Minimise F until its duality gap is at most the goal.

    Each step minimises F(t) + ||t - s||^2 / (2 step) over t and moves s there. The longer the step,
    the closer to the minimum, and the harder to get there.

    Returns:
        the best point, prices [r] with the best bound on F, that bound, and the Newton steps taken.
    """
    shortfall = problem.shortfall(s)
    u = 2 * np.maximum(shortfall, 0)
    at = best = _Point(s, shortfall, u, problem.values(u))
    prices, bound, iterations = np.zeros_like(u), 0.0, 0
    if best.objective <= goal:
        return best, prices, bound, iterations
    step, growth = 10 * problem.feasible.cap / float(at.values.max()), 10.0
    accuracy, idle = goal / 10, 0
    while (gap := best.objective - bound) > goal and iterations < max_iterations and idle < IDLE:
        moved, taken, solved = _proximal_step(problem, at, step, accuracy)
        iterations += max(taken, 1)
        bar.update(max(taken, 1))
        if (by_these := problem.bound(moved.u, moved.values)) > bound:
            prices, bound = moved.u, by_these
        if moved.objective > best.objective + goal:
            step, growth = step / 10, growth**0.5
        else:
            at = moved
            best = min(best, at, key=lambda point: point.objective)
            if not solved:
                step /= 10
            elif taken <= 10:
                step *= growth
            if not taken:
                accuracy /= 10
        idle = 0 if best.objective - bound < 0.99 * gap else idle + 1
        bar.set_postfix(gap=f"{best.objective - bound:.1e}", goal=f"{goal:.1e}")
    return best, prices, bound, iterations


def _proximal_step(
    problem: _Problem, start: _Point, step: float, accuracy: float
) -> tuple[_Point, int, bool]:
    """Newton's method on the dual of one proximal problem, until its gap is at most the accuracy.

    For a given u >= 0 the best s is the projection of centre + step P u; the dual is concave with
    the gradient target - u/2 - P's and, almost everywhere, a Hessian that only the rows strictly
    between 0 and 1/n enter.

    Returns:
        the point of the smallest gap, the Newton steps taken, and whether the gap was closed.
    """
    centre, u, values = start.s, start.u, start.values
    target, feasible = problem.target, problem.feasible

    def dual(u: Array, values: Array) -> tuple[float, Array]:
        s, shift = feasible.project(centre + step * values)
        moved = s - centre
        # The last term is zero but for rounding, to which it makes the value insensitive.
        excess = feasible.sums(s) - feasible.totals
        highest = values @ s - moved @ moved / (2 * step) - shift @ excess / step
        return float(u @ target - u @ u / 4 - highest), s

    value, s = dual(u, values)
    closest, least, since = start, np.inf, 0
    for taken in range(NEWTON_STEPS):
        shortfall = problem.shortfall(s)
        lacking = np.maximum(shortfall, 0)
        gap = float(((lacking - u / 2) ** 2).sum() + u @ (lacking - shortfall))
        since += 1
        if gap < least:
            closest, least, since = _Point(s, shortfall, u, values), gap, 0
        if gap <= accuracy:
            return closest, taken, True
        aim = _newton(step * problem.scatter((s > 0) & (s < feasible.cap)), u, shortfall)
        if aim is None:
            break
        slope, length = (shortfall - u / 2) @ (aim - u), 1.0
        rounding = ROUNDING * (u @ target)
        if slope <= rounding and since > PATIENCE:
            break
        ahead = problem.values(aim)
        while length > 1e-4:
            trial, at_trial = u + length * (aim - u), values + length * (ahead - values)
            value_there, s = dual(trial, at_trial)
            if value_there >= value + 1e-4 * length * slope - rounding:
                break
            length /= 2
        else:
            break
        u, values, value = trial, at_trial, value_there
    return closest, taken, False


def _newton(curvature: Array, u: Array, shortfall: Array) -> Array | None:
    """Where the dual's quadratic model at u is greatest within u >= 0; None beyond arithmetic."""
    try:
        L = np.linalg.cholesky(curvature + 0.5 * np.eye(len(u)))
        right = solve_triangular(L, shortfall - u / 2, lower=True) + L.T @ u
        found: Array = nnls(L.T, right, maxiter=30 * len(u))[0]
    except (np.linalg.LinAlgError, RuntimeError):
        return None
    return found
