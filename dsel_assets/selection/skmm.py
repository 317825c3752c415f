"""SkMM: a subset whose second moment of gradients matches that of the pool.

Y. Dong, H. Phan, X. Pan, Q. Lei, "Sketchy Moment Matching: Toward Fast and Provable Data
Selection for Finetuning", NeurIPS 2024, arXiv:2407.06120.

With sketched gradients G [N, m], the pool has the moment Sigma = G'G/N = V diag(lambda) V' and a
subset S of size n the moment Sigma_S = G_S'G_S/n. Finetuning on S is nearly as good as on the pool
when Sigma <= c_S Sigma_S for a small c_S. Moments are not centred. Selected examples carry no
weights: the weights here are probabilities of being selected.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsel_assets.data.examples import Examples
from dsel_assets.selection.arrays import as_blocks, as_rows
from dsel_assets.selection.coverage import clusters, covered
from dsel_assets.selection.interface import Choice, Needs, Selection, Selector, State
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

Array = NDArray[Any]

SOLVERS = ("auto", "sequential", "convex")
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
    """Moment matching on gradient sketches: sequential, or sampled from the convex solution."""

    name = "skmm"
    grows = (1, 1)  # every row again for each pick
    version = 2
    needs = Needs.SKETCHES | Needs.LABELS
    nested = False
    warms = True
    aim = "trace_score"
    lower = True

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
        """The same under quotas: they bind the subset, and its moment is still the pool's.

        A warm start stays near the selection that it goes on from: its state holds ids and weights.
        """
        assert pool.sketches is not None
        sketches = reduce_sketches(pool.sketches, strata.n, self.dimension)
        before = None if warm is None else _weights_before(pool.ids, warm)
        if self.solver == "sequential":
            begin = None if before is None else np.flatnonzero(before)
            found = select_sequential(sketches, strata.n, seed=seed, strata=strata, start=begin)
            rows, weights = found.indices, np.zeros(len(pool))
            weights[rows] = 1 / strata.n
            scores = {"gain": found.gains}
            how: dict[str, Any] = {
                "trace_before_exchanges": found.start_trace,
                "exchanges": found.exchanges,
            }
        else:
            match = match_moments(
                sketches, strata.n, c=self.c, tol=self.tol, seed=seed, strata=strata, start=before
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
        if before is not None:
            how["kept"] = int(np.count_nonzero(before[rows]))
        held = np.flatnonzero(weights)
        return Choice(
            rows,
            scores,
            how | _diagnostics(sketches, pool.labels, rows, seed),
            {"ids": pool.ids[held], "weights": weights[held]},
        )

    def objective(
        self, pool: Examples, target: Examples | None, ids: NDArray[np.str_], own: Selection
    ) -> float:
        """Distance of their moment from the pool's: `trace_score` of `compare_moments`."""
        assert pool.sketches is not None
        blocks = as_blocks(reduce_sketches(pool.sketches, len(own.ids), self.dimension), "sketches")
        chosen = blocks[np.isin(pool.ids, ids)]
        return compare_moments(chosen, second_moment(blocks), len(blocks))["trace_score"]


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


def _diagnostics(sketches: Array, labels: Array, rows: Array, seed: int) -> dict[str, Any]:
    """What the chosen rows cover, the median of uniform draws of as many, and how many do as well.

    A subset does as well if it spans as many directions with no larger trace score.
    """
    blocks = as_blocks(sketches, "sketches")
    moment = second_moment(blocks)
    parts = intrinsic_dimension(np.linalg.eigvalsh(moment), len(blocks))
    cluster = clusters(as_rows(sketches, "sketches"), parts)

    def look(chosen: Array) -> dict[str, float]:
        return compare_moments(blocks[chosen], moment, len(blocks)) | {
            "classes_covered": covered(labels, chosen),
            "clusters_covered": covered(cluster, chosen),
        }

    rng = np.random.default_rng([seed, 2])
    own = look(rows)
    uniform = [look(rng.choice(len(blocks), len(rows), replace=False)) for _ in range(DRAWS)]
    as_good = [
        (u["rank"], -u["trace_score"]) >= (own["rank"], -own["trace_score"]) for u in uniform
    ]
    return {
        "dimension": blocks.shape[-1],
        **own,
        **{f"uniform_{name}": float(np.median([u[name] for u in uniform])) for name in own},
        "uniform_as_good": float(np.mean(as_good)),
    }
