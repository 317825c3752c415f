"""SkMM: a subset whose second moment of gradients matches that of the pool.

Y. Dong, H. Phan, X. Pan, Q. Lei, "Sketchy Moment Matching: Toward Fast and Provable Data
Selection for Finetuning", NeurIPS 2024, arXiv:2407.06120.

With sketched gradients G [N, m], the pool has the moment Sigma = G'G/N = V diag(lambda) V' and a
subset S of size n the moment Sigma_S = G_S'G_S/n. Finetuning on S is nearly as good as on the pool
when Sigma <= c_S Sigma_S for a small c_S. Moments are not centred. Selected examples carry no
weights: the weights here are probabilities of being selected.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_triangular
from scipy.optimize import nnls

from dsel_assets.data.examples import Examples
from dsel_assets.selection.arrays import as_rows
from dsel_assets.selection.interface import Choice, Needs, Selector, State
from dsel_assets.selection.moments import energies, moment_diagnostics, reduce_sketches
from dsel_assets.selection.rounding import round_weights
from dsel_assets.selection.simplex import project

Array = NDArray[Any]

SOLVERS = ("auto", "convex")

NEWTON_STEPS = 40
# Rounding errors that the largest term of a sum may have left in the result, in units of eps.
NOISE = 100


@dataclass(frozen=True)
class MomentMatch:
    """What `match_moments` returns.

    Attributes:
        weights: [N] float64 s, 0 <= s <= 1/n, of sum 1.
        objective: ||P's - gamma * lambda||^2 at s and its best gamma, in the fourth power of the
            unit of the sketches.
        optimality: bound on how far the objective lies above its minimum (duality gap), divided by
            the objective at s = 1/N, gamma = 1/c.
        iterations: Newton steps taken, each O(N m).
        gamma: [r] float64 >= 1/c, the achieved P's / lambda where it exceeds 1/c.
        eigenvalues: [r] float64 lambda, ascending, of the r directions that the pool spans.
    """

    weights: Array
    objective: float
    optimality: float
    iterations: int
    gamma: Array
    eigenvalues: Array

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
) -> MomentMatch:
    """Probabilities s with which n of N examples match the pool's moment in its eigenbasis.

    Minimises ||P's - gamma * lambda||^2 over 0 <= s <= 1/n, sum s = 1 and gamma >= 1/c, where
    P_ij = (GV)_ij^2 (the relaxation of Sigma <= c Sigma_S to the diagonal in the basis V). The
    best gamma is max(1/c, P's / lambda), which leaves F(s) = ||min(0, P's - lambda/c)||^2: convex,
    but so flat that gradient methods stall. The proximal point method turns it into problems in
    m dual variables, each solved by a few Newton steps. The start is 1/n on n random examples, and
    of the many solutions the one found lies near it: the seed makes the draw.

    Args:
        sketches: [N, m] numpy array or torch tensor; only their directions and relative lengths
            matter.
        n: size of the subset, 1 <= n <= N.
        c: the bound on c_S asked for, below 1.
        tol: stops when the optimality is this small.
        seed: of the start.
        max_iterations: bound on the Newton steps; a warning tells when it ends the work.

    Raises:
        ValueError: n outside [1, N], c or tol not positive, sketches that are not a finite matrix
            or are all zero.
    """
    G = as_rows(sketches, "sketches").astype(np.float64)
    N = len(G)
    if not 1 <= n <= N:
        raise ValueError(f"n = {n}: a subset of {N} examples has between 1 and {N}")
    if not (c > 0 and tol > 0):
        raise ValueError(f"c = {c} and tol = {tol} must be positive")
    P, eigenvalues = energies(G)
    unit = eigenvalues[-1]
    P, target = P / unit, eigenvalues / unit / c
    # At c = 1 uniform weights are optimal and the reference would be 0.
    reference = float(target @ target) * max((1 - c) ** 2, 1e-12)
    if c >= 1:
        warnings.warn(f"c = {c} >= 1: uniform weights are already optimal", stacklevel=2)
    elif (bound := _least_c(P, n)) > c and n < N:
        warnings.warn(
            f"c = {c} is out of reach: no {n} examples have c_S below {bound:.6g}, the ratio of "
            "the pool's mean squared norm to theirs (1 if all norms are equal)",
            stacklevel=2,
        )

    s = np.zeros(N)
    s[np.random.default_rng([seed, 0]).choice(N, n, replace=False)] = 1 / n
    solution, optimality, iterations = _proximal_point(
        P, target, n, s, tol * reference, max_iterations
    )
    moment = solution @ P
    objective = float((np.minimum(0, moment - target) ** 2).sum())
    optimality /= reference
    if optimality > tol:
        warnings.warn(
            f"stopped after {iterations} iterations at optimality {optimality:.2g} > {tol:.2g}",
            stacklevel=2,
        )
    return MomentMatch(
        weights=solution,
        objective=objective * float(unit) ** 2,
        optimality=optimality,
        iterations=iterations,
        gamma=np.maximum(moment / target, 1) / c,
        eigenvalues=eigenvalues,
    )


def select_matching(sketches: ArrayLike, n: int, *, solver: str = "auto", seed: int = 0) -> Array:
    """Choose n examples whose second moment of sketches matches the pool's.

    Args:
        sketches: [N, m] numpy array or torch tensor, used as given; m should be well below n (see
            `reduce_sketches`).
        n: size of the subset, 1 <= n <= N.
        solver: "convex" samples from the weights of `match_moments`; "auto" is "convex".
        seed: of the start and of the draw.

    Returns:
        [n] int64, distinct, in the order of the draw.

    Raises:
        ValueError: unknown solver, or as for `match_moments`.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; the solvers are {', '.join(SOLVERS)}")
    return round_weights(match_moments(sketches, n, seed=seed).weights, n, seed=seed)


def _least_c(P: Array, n: int) -> float:
    """No n rows have a smaller c_S: the pool's mean squared norm over that of the n longest."""
    norms = P.sum(1)
    return float(norms.mean() / np.partition(norms, len(norms) - n)[-n:].mean())


def _proximal_point(
    P: Array, target: Array, n: int, s: Array, goal: float, max_iterations: int
) -> tuple[Array, float, int]:
    """Minimise F(s) = ||min(0, P's - target)||^2 until its duality gap is at most the goal.

    Each step minimises F(t) + ||t - s||^2 / (2 step) and moves s there. The dual of F is
    D(u) = u'target - ||u||^2 / 4 - max_s u'P's over u >= 0.
    """
    shortfall = np.maximum(target - s @ P, 0)
    u, objective = 2 * shortfall, float(shortfall @ shortfall)
    if objective == 0:
        return s, 0.0, 0
    step = 10 / n / float((P @ u).max())
    shortest, longest, accuracy = step / 1e3, step * 1e15, 1e-4 * np.sqrt(goal / len(u))
    best, least, bound = s, objective, 0.0
    gradient_gap = last = np.inf
    iterations = 0
    while gradient_gap > goal and iterations < max_iterations and step > shortest:
        noise = NOISE * np.finfo(float).eps * step * float((P @ u).max() * P.max())
        moved = _proximal_step(P, target, n, s, u, step, max(accuracy, noise))
        iterations += max(moved.taken, 1)
        shortfall = np.maximum(target - moved.s @ P, 0)
        if shortfall @ shortfall > objective * (1 + 1e-9):
            step = longest = step / 10
            continue
        s, u, objective = moved.s, moved.u, float(shortfall @ shortfall)
        from_gradient = _dual(P, target, n, 2 * shortfall)
        gradient_gap = objective - from_gradient
        bound = max(bound, from_gradient, _dual(P, target, n, u))
        if objective < least:
            best, least = s, objective
        certified = objective - bound <= goal
        if certified:
            # Good enough, but where it can be had, the gap of the gradient shall show it too.
            if noise <= accuracy and gradient_gap > last / 2:
                break
            best, least, last = s, objective, gradient_gap
        if certified and noise > accuracy:
            # Long steps amplify rounding; short ones from a solution make its gradient exact.
            step = longest = step / 10
        elif not moved.solved:
            step /= 10
        elif moved.taken <= 10:
            step = min(10 * step, longest)
    return best, max(least - bound, 0.0), iterations


def _dual(P: Array, target: Array, n: int, u: Array) -> float:
    values: Array = P @ u
    return float(u @ target - u @ u / 4 - np.partition(values, len(values) - n)[-n:].mean())


class _Step(NamedTuple):
    s: Array
    u: Array
    taken: int
    solved: bool


def _proximal_step(
    P: Array, target: Array, n: int, centre: Array, u: Array, step: float, accuracy: float
) -> _Step:
    """Newton's method on the dual of one proximal problem.

    For a given u >= 0 the best s is the projection of centre + step P u; the dual is concave with
    the gradient target - u/2 - P's and, almost everywhere, a Hessian that only the rows strictly
    between 0 and 1/n enter.
    """

    def dual(u: Array) -> tuple[float, Array]:
        values = P @ u
        s, shift = project(centre + step * values, 1 / n)
        moved = s - centre
        # The last term is zero but for rounding, to which it makes the value insensitive.
        lowest = values @ s - moved @ moved / (2 * step) - shift / step * (s.sum() - 1)
        return float(u @ target - u @ u / 4 - lowest), s

    value, s = dual(u)
    last = np.inf
    for taken in range(NEWTON_STEPS):
        shortfall = target - s @ P
        residual = np.abs(np.maximum(shortfall, 0) - u / 2).max()
        if residual <= accuracy:
            return _Step(s, u, taken, True)
        gradient = shortfall - u / 2
        free = P[(s > 0) & (s < 1 / n)]
        free = free - (free.mean(0) if len(free) else 0)
        try:  # the Newton step within u >= 0
            L = np.linalg.cholesky(step * free.T @ free + 0.5 * np.eye(len(u)))
            right = solve_triangular(L, gradient, lower=True) + L.T @ u
            aim = nnls(L.T, right, maxiter=30 * len(u))[0]
        except (np.linalg.LinAlgError, RuntimeError):  # the step is too long for the arithmetic
            return _Step(s, u, taken, False)
        slope, length = gradient @ (aim - u), 1.0
        rounding = 4 * np.finfo(float).eps * (u @ target)
        if slope <= rounding and residual > last / 2:
            return _Step(s, u, taken, True)
        last = residual
        while length > 1e-10:
            trial = u + length * (aim - u)
            trial_value, trial_s = dual(trial)
            if trial_value >= value + 1e-4 * length * slope - rounding:
                break
            length /= 2
        else:
            return _Step(s, u, taken, False)
        u, value, s = trial, trial_value, trial_s
    return _Step(s, u, NEWTON_STEPS, False)


class Skmm(Selector):
    """SkMM on gradient sketches: the convex problem, then n examples sampled by its solution."""

    name = "skmm"
    version = 1
    needs = Needs.SKETCHES | Needs.LABELS
    nested = False

    def __init__(self, *, c: float = 0.999, tol: float = 1e-4) -> None:
        self.c, self.tol = c, tol

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """Rows sampled without replacement by the weights s, with a uniform draw's c_S beside."""
        assert pool.sketches is not None
        sketches = reduce_sketches(pool.sketches, n)
        found = match_moments(sketches, n, c=self.c, tol=self.tol, seed=seed)
        rows = round_weights(found.weights, n, seed=seed)
        uniform = np.random.default_rng(seed).choice(len(pool), n, replace=False)
        return Choice(
            rows,
            {"probability": found.weights[rows]},
            {
                "objective": found.objective,
                "optimality": found.optimality,
                "iterations": found.iterations,
                "dimension": sketches.shape[1],
                "effective_support": float(1 / np.square(found.weights).sum()),
            }
            | moment_diagnostics(sketches, rows)
            | {f"uniform_{k}": v for k, v in moment_diagnostics(sketches, uniform).items()},
        )
