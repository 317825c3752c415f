"""SkMM: a subset whose second moment of gradients matches that of the pool.

Y. Dong, H. Phan, X. Pan, Q. Lei, "Sketchy Moment Matching: Toward Fast and Provable Data
Selection for Finetuning", NeurIPS 2024, arXiv:2407.06120.

With sketched gradients G [N, m], the pool has the moment Sigma = G'G/N = V diag(lambda) V' and a
subset S of size n the moment Sigma_S = G_S'G_S/n. Finetuning on S is nearly as good as on the pool
when Sigma <= c_S Sigma_S for a small c_S. Moments are not centred. Selected examples carry no
weights: the weights here are probabilities of being selected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsel_assets.data.examples import Examples
from dsel_assets.selection.arrays import as_blocks, as_rows
from dsel_assets.selection.coverage import clusters, covered
from dsel_assets.selection.interface import Choice, Selection, Selector, State
from dsel_assets.selection.matching import match_moments
from dsel_assets.selection.moments import (
    compare_moments,
    intrinsic_dimension,
    reduce_sketches,
    second_moment,
)
from dsel_assets.selection.rounding import round_weights
from dsel_assets.selection.sequential import select_sequential
from dsel_assets.selection.strata import Strata
from dsel_assets.selection.strategies import STRATEGIES

Array = NDArray[Any]

SOLVERS = ("auto", "sequential", "convex")
UNIFORM = "uniform_"
DRAWS = 20  # uniform subsets that a selection is held against


def select_matching(
    sketches: ArrayLike,
    n: int,
    *,
    solver: str = "auto",
    rounding: str = "sample",
    seed: int = 0,
    strata: Strata | None = None,
) -> Array:
    """Choose n examples whose second moment of sketches matches the pool's.

    Args:
        sketches: [N, m] or [N, k, m] (k rows an example), numpy or torch, used as given; m should
            be well below n (see `reduce_sketches`).
        n: size of the subset, 1 <= n <= N.
        solver: "sequential" is `select_sequential`; "convex" draws from the weights of
            `match_moments`; "auto" is "sequential".
        rounding: how the weights of "convex" become a subset, see `round_weights`.
        seed: of every draw.
        strata: quotas.

    Returns:
        [n] int64, distinct, in the order of choice.

    Raises:
        ValueError: unknown solver, or as for the function that is used.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; the solvers are {', '.join(SOLVERS)}")
    if solver == "convex":
        weights = match_moments(sketches, n, seed=seed, strata=strata).weights
        return round_weights(weights, n, rule=rounding, seed=seed, strata=strata)
    return select_sequential(sketches, n, seed=seed, strata=strata).indices


class Skmm(Selector):
    """Moment matching on gradient sketches: sequential, or sampled from the convex solution.

    After an arrival it stays near what was chosen before: that, and what has come since, is held
    against the moment of the whole pool, to which the new examples are added. Of the rest nothing
    is looked at, and the uniform draws are those of the last look at everything.
    """

    traits = STRATEGIES["skmm"]

    def __init__(
        self,
        *,
        solver: str = "auto",
        dimension: int | None = None,
        c: float = 0.999,
        tol: float = 1e-4,
        rounding: str = "sample",
    ) -> None:
        self.solver = "sequential" if solver == "auto" else solver
        self.dimension, self.c, self.tol, self.rounding = dimension, c, tol, rounding

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """Rows whose moment matches the pool's, with how well uniform draws would."""
        strata = Strata.whole(len(pool), n)
        return self.choose_within(pool, target, strata, seed=seed, warm=warm)

    def choose_within(
        self,
        pool: Examples,
        target: Examples | None,
        strata: Strata,
        *,
        seed: int,
        warm: State | None,
    ) -> Choice:
        """The same under quotas: they bind the subset, and its moment is still the pool's."""
        assert pool.sketches is not None
        m = self.dimension if warm is None else len(warm["moment"])
        sketches = reduce_sketches(pool.sketches, strata.n, m)
        blocks = as_blocks(sketches, "sketches")
        if warm is None:
            whole = _Whole.of(blocks, strata.n, seed)
        else:
            whole = _Whole.grown(warm, blocks[~np.isin(pool.ids, warm["ids"])])
        before = None if warm is None else _weights_before(pool.ids, warm)
        if self.solver == "sequential":
            begin = None if before is None else np.flatnonzero(before)
            found = select_sequential(
                sketches, strata.n, seed=seed, strata=strata, start=begin, moment=whole.moment
            )
            rows, weights = found.indices, np.zeros(len(pool))
            weights[rows] = 1 / strata.n
            scores = {"gain": found.gains}
            how: dict[str, Any] = {
                "trace_before_exchanges": found.start_trace,
                "exchanges": found.exchanges,
            }
        else:
            match = match_moments(
                sketches,
                strata.n,
                c=self.c,
                tol=self.tol,
                seed=seed,
                strata=strata,
                start=before,
                moment=whole.moment,
            )
            weights = match.weights
            rows = round_weights(
                weights,
                strata.n,
                rule=self.rounding,
                seed=seed,
                strata=strata,
                uniforms=_uniforms(pool.ids, seed),
            )
            scores = {"probability": weights[rows]}
            how = {
                "moment_objective": match.objective,
                "optimality": match.optimality,
                "iterations": match.iterations,
                "effective_support": match.support,
            }
        how |= {"dimension": blocks.shape[-1], **whole.held_against(blocks[rows])}
        if before is None:
            how |= _coverage(sketches, whole.moment, pool.labels, rows, seed)
        else:
            how["kept"] = int(np.count_nonzero(before[rows]))
        held = np.flatnonzero(weights)
        return Choice(
            rows,
            scores,
            how,
            {"ids": pool.ids[held], "weights": weights[held], **whole.state},
        )

    def objective(self, chosen: Examples, target: Examples | None, own: Selection) -> float | None:
        """Distance of their moment from the pool's: `trace_score` of `compare_moments`."""
        if not own.state:
            return None
        assert chosen.sketches is not None
        moment = own.state["moment"]
        reduced = reduce_sketches(chosen.sketches, len(own.ids), len(moment))
        blocks = as_blocks(reduced, "sketches")
        return compare_moments(blocks, moment, int(own.state["rows"]))["trace_score"]


@dataclass(frozen=True)
class _Whole:
    """The pool that a selection is held against.

    moment: [m, m] Sigma; rows: how many examples it is the mean of.
    uniform: by name, [DRAWS] of what `compare_moments` says of uniform draws of as many.
    """

    moment: Array
    rows: int
    uniform: Mapping[str, Array]

    @classmethod
    def of(cls, blocks: Array, n: int, seed: int) -> _Whole:
        """Of sketches [N, k, m], with draws of n."""
        moment, rows = second_moment(blocks), len(blocks)
        found = [compare_moments(blocks[draw], moment, rows) for draw in _draws(rows, n, seed)]
        return cls(moment, rows, {name: np.array([f[name] for f in found]) for name in found[0]})

    @classmethod
    def grown(cls, before: State, new: Array) -> _Whole:
        """The same with more examples, [c, k, m]; the draws stay what they were."""
        rows = int(before["rows"])
        total = before["moment"] * rows + (second_moment(new) * len(new) if len(new) else 0)
        drawn = {
            name.removeprefix(UNIFORM): values
            for name, values in before.items()
            if name.startswith(UNIFORM)
        }
        return cls(total / (rows + len(new)), rows + len(new), drawn)

    def held_against(self, chosen: Array) -> dict[str, float]:
        """How well chosen rows cover it, the median of the draws, and how many do as well.

        A draw does as well if it spans as many directions with no larger trace score.
        """
        own = compare_moments(chosen, self.moment, self.rows)
        drawn = zip(self.uniform["rank"], self.uniform["trace_score"], strict=True)
        as_good = [(rank, -trace) >= (own["rank"], -own["trace_score"]) for rank, trace in drawn]
        medians = {f"{UNIFORM}{name}": float(np.median(self.uniform[name])) for name in own}
        return own | medians | {"uniform_as_good": float(np.mean(as_good))}

    @property
    def state(self) -> State:
        """As arrays by name."""
        drawn = {f"{UNIFORM}{name}": values for name, values in self.uniform.items()}
        return {"moment": self.moment, "rows": np.array(self.rows), **drawn}


def _draws(rows: int, n: int, seed: int) -> Iterator[Array]:
    rng = np.random.default_rng([seed, 2])
    return (rng.choice(rows, n, replace=False) for _ in range(DRAWS))


def _weights_before(ids: NDArray[np.str_], warm: State) -> Array:
    """[N] of the examples of sorted ids: what an earlier selection gave them, 0 if nothing."""
    weights = np.zeros(len(ids))
    place = np.minimum(np.searchsorted(ids, warm["ids"]), len(ids) - 1)
    there = ids[place] == warm["ids"]
    weights[place[there]] = warm["weights"][there]
    return weights


def _uniforms(ids: NDArray[np.str_], seed: int) -> Array:
    """A number in (0, 1) that belongs to an id and a seed, whatever else is in the pool.

    Drawn by these, subsets of this week and the next differ only as far as their weights do.
    """
    from pandas.util import hash_array

    keys = hash_array(ids.astype(object), hash_key=f"{seed:016d}", categorize=False)
    return (keys.astype(np.float64) + 0.5) / 2.0**64


def _coverage(
    sketches: Array, moment: Array, labels: Array, rows: Array, seed: int
) -> dict[str, float]:
    """Which share of classes and clusters the chosen rows reach, and the median uniform draw."""
    parts = intrinsic_dimension(np.linalg.eigvalsh(moment), len(sketches))
    by = {"classes": labels, "clusters": clusters(as_rows(sketches, "sketches"), parts)}
    found = {}
    for name, of in by.items():
        drawn = [covered(of, draw) for draw in _draws(len(of), len(rows), seed)]
        found[f"{name}_covered"] = covered(of, rows)
        found[f"{UNIFORM}{name}_covered"] = float(np.median(drawn))
    return found
