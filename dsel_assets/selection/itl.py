"""ITL: greedy choice of the candidates that say most about a set of targets.

J. Hübotter, B. Sukhija, L. Treven, Y. As, A. Krause, "Transductive Active Learning: Theory and
Applications", NeurIPS 2024, arXiv:2402.15898.

f is a Gaussian process over the rows, observed with Gaussian noise. No label is needed to know how
far an observation will reduce the uncertainty about the targets, so the whole choice can be made
beforehand.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from dsel_assets.data.examples import Examples
from dsel_assets.selection.acquisition import RULES, Rule
from dsel_assets.selection.arrays import CHUNK, as_rows, chunks
from dsel_assets.selection.interface import Choice, Selection, Selector, State
from dsel_assets.selection.kernels import Kernel, Linear, make_kernel
from dsel_assets.selection.nearest import nearest
from dsel_assets.selection.posterior_trackers import Posterior, Start, follow
from dsel_assets.selection.similarity import centre_of, centred
from dsel_assets.selection.strata import Strata
from dsel_assets.selection.strategies import STRATEGIES

Array = NDArray[Any]

FORMS = ("paper", "library")
TIE = 1e-12  # scores that differ by less are equal: which is larger is up to rounding
SHOWN = 6  # decimals of a cosine
DISPLACED = 3  # ids that a pick is shown to have made redundant


@dataclass(frozen=True)
class Until:
    """Where to stop before n picks, whichever comes first.

    target_variance: as soon as no target's variance is above it.
    gain: before the first pick that would gain fewer nats. Gains may rise again after it, since
        two observations can say more together than each alone.
    alpha: before pick i if the worst target's standard deviation would still be above
        1/(alpha i) after it: SIFT's adaptive stop (arXiv:2410.08020), which spends more picks
        where they help more.
    """

    target_variance: float | None = None
    gain: float | None = None
    alpha: float | None = None

    def reached(self, target_variance: Array) -> bool:
        """Whether no further pick is needed."""
        return self.target_variance is not None and bool(
            (target_variance <= self.target_variance).all()
        )

    def refuses(self, count: int, gain: float, target_variance: Array) -> bool:
        """Whether pick number `count`, with this outcome, is not worth making."""
        if self.gain is not None and gain < self.gain:
            return True
        return self.alpha is not None and bool(
            np.sqrt(target_variance.max()) > 1 / (self.alpha * count)
        )


@dataclass(frozen=True)
class Informative:
    """What `select_informative` returns; n picks, m targets.

    Attributes:
        indices: [n] int64, rows of the candidates, in the order of choice.
        gains: [n] float64, nats of information about noisy observations of the targets that each
            pick adds; about f itself where there are no targets.
        target_variance: [n, m] float64, variance of f at each target after each pick.
        state: what a later call needs to go on from here: arrays by name.
        displaced: [n, k] int64, the open candidates whose score each pick lowered most, which it
            made redundant; -1 where fewer fell.
        missed: [n] float64, with `preselect`: how far the best candidate that was left out would
            have been above each pick, in the unit of the rule (nats, or the targets' variance), and
            0 where none was. All zeros: the choice is that from all candidates.
    """

    indices: Array
    gains: Array
    target_variance: Array
    state: State
    displaced: Array
    missed: Array


def select_informative(
    candidates: ArrayLike,
    targets: ArrayLike | None,
    n: int,
    *,
    rule: str = "itl",
    form: str = "paper",
    noise: float | None = None,
    target_noise: float | None = None,
    kernel: str | Kernel = "linear",
    taken: ArrayLike | None = None,
    forbidden: ArrayLike | None = None,
    required: ArrayLike | None = None,
    strata: Strata | None = None,
    until: Until | None = None,
    repeats: bool = False,
    preselect: int | None = None,
    state: State | None = None,
    displaced: int = 0,
    progress: bool = False,
) -> Informative:
    """Choose n candidates, one after the other, that say most about f at the targets.

    The choice is the exact greedy one over all candidates; without quotas a smaller n is a prefix
    of a larger. Equal scores go to the lowest index. Rows are used as given: centring or scaling
    them to unit norm beforehand changes the choice. Whatever the rows are, sums are in double
    precision.

    Rules: "itl", the largest information gain about noisy observations of all targets together;
    "vtl", the largest fall of their summed variance; "mm_itl", the largest sum of the information
    about each; "ctl", the largest sum of correlations with them; "undirected_itl", the most
    uncertain candidate, for which there need be no targets. VTL with the candidates as targets, or
    with rows R such that R'R = X'X, is undirected VTL.

    Args:
        candidates: [N, d] numpy array, also memory-mapped, or torch tensor; float32 and float64
            are read in place, once a pick, and need not fit in memory. Half precision is copied.
        targets: [m, d].
        n: number of picks; at most so many where `until` is given.
        rule: one of the above.
        form: of ITL and MM-ITL: "paper" adds the noise to the variances in the ratio; "library"
            (what the authors' package `activeft` computes) does not, which ignores the candidates'
            norms. It decides the picks; gains are always those of the paper.
        noise: variance of the observation noise, in squared units of f (of the rows, where the
            kernel is linear); by default that of the state, else the candidates' mean k(x, x).
        target_noise: the same for the targets in ITL; by default `noise` (eq. 44). A small
            positive one stands for none (eq. 43).
        kernel: "linear", "rbf", "matern" (lengthscale 1), or one of `selection.kernels`. Those
            that are not linear keep 8 (2n + m) N bytes.
        taken: indices of candidates that have a label: observed beforehand, not picked again.
        forbidden: indices of candidates that are not picked; they are not observed.
        required: indices of candidates that are picked first, in this order; they count in n.
        strata: quotas: of each part exactly its count, of sum n. A full part is closed.
        until: where to stop earlier.
        repeats: a candidate may be picked more than once.
        preselect: choose only from so many nearest candidates of each target, and report in
            `missed` what that cost; one pass over the candidates before and one after.
        state: of an earlier call with the same targets, kernel and noise. What it took and picked
            counts as observed and is not picked again, so that 50 picks and then 50 more are the
            same 100 as in one call. Candidates may have come since, after those there were.
        displaced: how many candidates to name that each pick made redundant.
        progress: show a bar.

    Raises:
        ValueError: unknown rule, form or kernel; empty or mis-shaped arrays; rows that are not
            finite; indices out of range; more picks than candidates; strata of another size; a
            state of other data.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; the rules are {', '.join(RULES)}")
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; the forms are {', '.join(FORMS)}")
    X = as_rows(candidates, "candidates")
    if targets is None and (RULES[rule].directed or preselect is not None):
        raise ValueError(f"{rule if preselect is None else 'preselect'} needs targets")
    T = X[:0] if targets is None else as_rows(targets, "targets")
    if X.shape[1] != T.shape[1]:
        raise ValueError(f"candidates have {X.shape[1]} features but targets {T.shape[1]}")
    kernel = make_kernel(kernel)
    scale = float(np.concatenate([kernel.diagonal(part) for part in chunks(X)]).mean())
    if noise is None:
        noise = scale if state is None else float(state["noise"])
    if target_noise is None:
        target_noise = noise if state is None else float(state["target_noise"])
    for name, value in (("noise", noise), ("target_noise", target_noise)):
        if not 0 < value < np.inf:
            raise ValueError(f"{name} = {value}: a variance of noise must be positive and finite")

    identity = {
        "targets": _digest(T),
        "kernel": _digest(np.array(repr(kernel))),
        "noise": np.array(noise),
        "target_noise": np.array(target_noise),
    }
    before = _earlier(state, X, identity)
    new = _indices(taken, len(X), "taken")
    observed = np.append(before["observed"], new[~np.isin(new, before["observed"])])

    closed = np.zeros(len(X), bool)
    closed[np.setdiff1d(observed, before["picks"]) if repeats else observed] = True
    closed[_indices(forbidden, len(X), "forbidden")] = True
    first = _indices(required, len(X), "required")
    if closed[first].any() or len(np.unique(first)) < len(first) or not len(first) <= max(n, 0):
        raise ValueError("required candidates are distinct, at most n, not taken nor forbidden")
    if strata is not None and (len(strata.of) != len(X) or strata.n != n):
        raise ValueError(
            f"strata of {strata.n} of {len(strata.of)} candidates, not of {n} of {len(X)}"
        )
    task = _Task(kernel, T, rule, form, noise, target_noise, scale, X[observed])
    room = _Room(
        closed,
        np.zeros(len(X), np.int64) if strata is None else strata.of,
        np.array([n]) if strata is None else strata.counts.copy(),
        repeats,
    )
    rest = (until, displaced, progress)
    if preselect is None:
        room.check(until is not None)
        found = _greedy(task, X, room, first, *rest)
    else:
        kept = np.union1d(nearest(X, T, preselect, kernel), first)
        left = np.flatnonzero(~np.isin(np.arange(len(X)), kept) & room.open)
        room = room.take(kept)
        room.check(until is not None)
        found = _greedy(task, X[kept], room, np.searchsorted(kept, first), *rest)
        missed = _missed(task, X, left, X[kept[found.indices]], found.missed)
        named = np.where(found.displaced < 0, -1, kept[found.displaced])
        found = replace(found, indices=kept[found.indices], displaced=named, missed=missed)
    observed = np.append(observed, found.indices)
    picks = np.append(before["picks"], found.indices)
    seen = {"observed": observed, "picks": picks, "rows": X[observed]}
    return replace(found, state=seen | identity)


@dataclass(frozen=True)
class _Task:
    """What is asked, whatever the candidates are."""

    kernel: Kernel
    targets: Array
    rule: str
    form: str
    noise: float
    target_noise: float
    scale: float
    observed: Array

    def begin(self, X: Array) -> tuple[Posterior, Rule]:
        """The processes at these candidates, and the scores."""
        T, rows = self.targets, self.observed
        starts = [Start(rows, np.full(len(rows), self.noise))]
        if len(T):
            noises = np.repeat([self.target_noise, self.noise], [len(T), len(rows)])
            starts.append(Start(np.concatenate([T, rows.astype(T.dtype)]), noises))
        rule = RULES[self.rule]
        posterior = follow(self.kernel, X, T, self.noise, starts, 1 + rule.informed)
        return posterior, rule(posterior, self.noise, self.form, self.scale)

    def gain(self, variances: list[float]) -> float:
        """Nats about the targets, from the variances of the processes at a candidate."""
        after = variances[1] if len(variances) > 1 else 0.0
        return max(0.0, 0.5 * np.log((variances[0] + self.noise) / (after + self.noise)))


class _Room:
    """Which candidates may be picked, as quotas and picks close them.

    open: [N] bool.   size: how many picks there is room for.
    """

    def __init__(self, closed: Array, of: Array, counts: Array, repeats: bool) -> None:
        self._of, self._counts, self._repeats = of, counts.copy(), repeats
        self.open = ~closed & (counts > 0)[of]
        there = np.bincount(of[self.open], minlength=len(counts))
        self.size = int(np.where(repeats & (there > 0), counts, np.minimum(there, counts)).sum())

    def check(self, fewer: bool) -> None:
        """Refuse what can't be done, unless fewer picks will do."""
        n = int(self._counts.sum())
        if n < 0 or not (fewer or n == self.size):
            raise ValueError(f"n = {n} picks from {self.size} candidates that may be picked")

    def take(self, rows: Array) -> _Room:
        """The same for these candidates only."""
        return _Room(~self.open[rows], self._of[rows], self._counts, self._repeats)

    def close(self, p: int) -> None:
        """Candidate p has been picked."""
        part = self._of[p]
        self._counts[part] -= 1
        self.open[p] = self._repeats
        if self._counts[part] == 0:
            self.open[self._of == part] = False


def _greedy(
    task: _Task,
    X: Array,
    room: _Room,
    first: Array,
    until: Until | None,
    displaced: int,
    progress: bool,
) -> Informative:
    """The choice; `missed` holds the worth of each pick, NaN for those that were required."""
    until, limit = until or Until(), room.size
    posterior, rule = task.begin(X)
    indices: list[int] = []
    gains, variances, worths, fallen = [], [], [], []
    with tqdm(total=limit, disable=not progress, desc="choosing") as bar:
        while len(indices) < limit and not until.reached(posterior.target_variance):
            scores = rule.scores()
            if len(indices) < len(first):
                p, worth = int(first[len(indices)]), np.nan
            else:
                allowed = np.where(room.open, scores, -np.inf)
                best = allowed.max()
                p = int(np.argmax(allowed >= best - TIE * abs(best)))
                worth = float(rule.worth(scores[p]))
            step = posterior.observe(p, rule.weights)
            rule.update(step)
            gain = task.gain(step.variances)
            if until.refuses(len(indices) + 1, gain, posterior.target_variance):
                break
            others = room.open & (np.arange(len(X)) != p) if displaced else room.open
            room.close(p)
            indices.append(p)
            gains.append(gain)
            worths.append(worth)
            variances.append(np.maximum(posterior.target_variance, 0.0))
            if displaced:
                fall = rule.worth(scores) - rule.worth(rule.scores())
                fallen.append(_largest(np.where(others, fall, 0.0), displaced))
            bar.update()
    return Informative(
        np.array(indices, np.int64),
        np.array(gains),
        np.array(variances).reshape(len(indices), len(task.targets)),
        {},
        np.array(fallen, np.int64).reshape(len(indices), displaced),
        np.array(worths),
    )


def _missed(task: _Task, X: Array, left: Array, picked: Array, worths: Array) -> Array:
    """[n] how far the best of the candidates `left` was above each pick; they are read once."""
    best = np.full(len(picked), -np.inf)
    rows = max(1, CHUNK // X.shape[1])
    for start in range(0, len(left), rows):
        block = X[left[start : start + rows]]
        posterior, rule = task.begin(np.concatenate([picked, block]))
        for i in range(len(picked)):
            best[i] = max(best[i], rule.worth(rule.scores()[len(picked) :].max()))
            rule.update(posterior.observe(i, rule.weights))
    found: Array = np.fmax(best - worths, 0.0)
    return found


def _largest(values: Array, k: int) -> Array:
    """Indices [k] of the largest values > 0, by falling value; -1 where there are fewer."""
    k_there = min(k, len(values))
    order = np.argpartition(-values, k_there - 1)[:k_there]
    order = order[np.argsort(-values[order], kind="stable")]
    found = np.full(k, -1)
    found[:k_there] = np.where(values[order] > 0, order, -1)
    return found


def _earlier(state: State | None, X: Array, identity: State) -> State:
    """What an earlier call observed and picked, if it was of these data."""
    if state is None:
        return {"observed": np.empty(0, np.int64), "picks": np.empty(0, np.int64)}
    differ = [name for name, value in identity.items() if not np.array_equal(state[name], value)]
    observed = state["observed"]
    known = observed[observed < len(X)]
    if len(known) < len(observed) or not np.array_equal(X[known], state["rows"]):
        differ = ["candidates", *differ]
    if differ:
        raise ValueError(f"the state belongs to another choice: its {', '.join(differ)} differ")
    return state


def _indices(values: ArrayLike | None, size: int, name: str) -> Array:
    array = np.asarray([] if values is None else values)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integer indices, not {array.dtype}")
    if array.size and not (array.min() >= 0 and array.max() < size):
        raise ValueError(f"{name} must lie in [0, {size}), not {array.min()}..{array.max()}")
    return array.astype(np.int64)


def _digest(values: Array) -> Array:
    digest = blake2b(f"{values.shape} {values.dtype}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(values).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


class Itl(Selector):
    """ITL on gradient sketches, centred on the pool and scaled to unit norm.

    Centring takes out the direction that all gradients share, unit norm the bias towards examples
    with large gradients, among them those with wrong labels. The choice is exact: no seed enters.
    Quotas close a full part and leave the rest to the rule.

    After an arrival, what was chosen before and what has come since compete anew, centred and with
    the noise as before; of the rest nothing is looked at. So a pick stays until a new example is
    worth more, and without new ones nothing changes.
    """

    traits = STRATEGIES["itl"]

    def __init__(
        self,
        *,
        rule: str = "itl",
        form: str = "paper",
        noise: float | None = None,
        kernel: str = "linear",
        preselect: int | None = None,
        until: Mapping[str, float | None] | None = None,
    ) -> None:
        self.rule, self.form, self.noise = rule, form, noise
        self.kernel, self.preselect = kernel, preselect
        self._largest: tuple[Examples, Examples, Choice, float] | None = None
        self.until = None if until is None else Until(**until)

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """As within one part; a smaller choice is the beginning of a larger that was just made."""
        assert target is not None
        if self._largest is not None and warm is None:
            known_pool, known_target, larger, seconds = self._largest
            if known_pool is pool and known_target is target and n <= len(larger.rows):
                return self._beginning(larger, n, seconds)
        started = time.perf_counter()
        strata = Strata.whole(len(pool), n)
        found = self.choose_within(pool, target, strata, seed=seed, warm=warm)
        if warm is None and self.preselect is None:
            self._largest = pool, target, found, time.perf_counter() - started
        return found

    def choose_within(
        self,
        pool: Examples,
        target: Examples | None,
        strata: Strata,
        *,
        seed: int,
        warm: State | None,
    ) -> Choice:
        """The picks in order, each with its gain and why it was picked.

        `nearest_target` is the target that it is most like, `variance_removed` the share of the
        targets' summed prior variance that it took away, `variance_left` what was left of it then,
        `worst_variance_left` the largest target's variance in units of the mean prior one,
        `displaced` the ids of the candidates that it made redundant, those that lost most first.
        With `until` there may be fewer picks than the budget allows.
        """
        assert target is not None
        centre = centre_of(pool) if warm is None else warm["centre"]
        candidates, targets = centred(pool, target, centre=centre)
        kernel = make_kernel(self.kernel)
        noise = self._noise(kernel, candidates) if warm is None else float(warm["noise"])
        found = select_informative(
            candidates,
            targets,
            strata.n,
            rule=self.rule,
            form=self.form,
            noise=noise,
            kernel=kernel,
            strata=strata,
            until=self.until,
            preselect=self.preselect,
            displaced=DISPLACED,
        )
        cosines = candidates[found.indices].astype(np.float64) @ targets.T.astype(np.float64)
        # products of other shapes round otherwise, and a choice must not depend on how it was made
        cosines = np.round(cosines, SHOWN)
        prior = float(kernel.diagonal(targets).mean())
        variance = found.target_variance / (prior or 1.0)
        left, worst = variance.mean(1), variance.max(1)
        scores = {
            "gain": found.gains,
            "nearest_target": target.ids[cosines.argmax(1)],
            "nearest_cosine": cosines.max(1),
            "variance_removed": -np.diff(left, prepend=float(prior > 0)),
            "variance_left": left,
            "worst_variance_left": worst,
            "displaced": np.array(
                [", ".join(pool.ids[row[row >= 0]]) for row in found.displaced], dtype=np.str_
            ),
        }
        said = {} if self.preselect is None else {"missed": _largest_of(found.missed)}
        return Choice(
            found.indices,
            scores,
            _said_of(scores, float(prior > 0)) | said,
            {"ids": pool.ids[found.indices], "centre": centre, "noise": np.array(noise)},
            stopped=self.until is not None,
        )

    def _beginning(self, larger: Choice, n: int, seconds: float) -> Choice:
        """The first n picks of a larger choice, which took so many seconds."""
        scores = {name: column[:n] for name, column in larger.scores.items()}
        return replace(
            larger,
            rows=larger.rows[:n],
            scores=scores,
            diagnostics=_said_of(scores, 0.0),
            state={**larger.state, "ids": larger.state["ids"][:n]},
            spent=seconds,
        )

    def objective(self, chosen: Examples, target: Examples | None, own: Selection) -> float | None:
        """Nats that noisy observations of these tell about noisy ones at the targets.

        Whatever the rule is: it is the sum of the gains, in any order (chain rule).
        """
        if not own.state:
            return None
        assert target is not None
        kernel, noise = make_kernel(self.kernel), float(own.state["noise"])
        rows, targets = centred(chosen, target, centre=own.state["centre"])
        parts = rows, targets, np.concatenate([rows, targets])
        alone, about, together = (_log_determinant(kernel, part, noise) for part in parts)
        return (alone + about - together) / 2

    def _noise(self, kernel: Kernel, candidates: Array) -> float:
        # equal rows say nothing and have no norm to take the noise from: any noise will do
        own = [kernel.diagonal(part) for part in chunks(candidates)]
        return self.noise or float(np.concatenate(own).mean()) or 1.0


def _said_of(scores: Mapping[str, Array], at_first: float) -> dict[str, Any]:
    """Diagnostics of picks with these scores; at_first: the variance left before any."""
    left = {name: scores[name] for name in ("variance_left", "worst_variance_left")}
    return {
        "information_nats": float(scores["gain"].sum()),
        "picks": len(scores["gain"]),
        **{name: float(of[-1]) if len(of) else at_first for name, of in left.items()},
    }


def _log_determinant(kernel: Kernel, rows: Array, noise: float) -> float:
    """Of the covariance of noisy observations, in units of the noise."""
    if isinstance(kernel, Linear) and len(rows) > rows.shape[1]:
        rows = rows.astype(np.float64)
        inner = rows.T @ rows
    else:
        inner = kernel.matrix(rows, rows)
    return float(np.linalg.slogdet(inner / noise + np.eye(len(inner)))[1])


def _largest_of(values: Array) -> float:
    return float(values.max(initial=0.0))
