"""Similarity to the targets, alone or times the base model's uncertainty: ITL's simplest peers.

CosineSimilarity and InformationDensity as in J. Hübotter, B. Sukhija, L. Treven, Y. As, A. Krause,
NeurIPS 2024, arXiv:2402.15898. No pick knows of those before: equal examples come together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsel_assets.data.examples import Examples
from dsel_assets.models import Builder
from dsel_assets.selection.arrays import directions
from dsel_assets.selection.attribution import attribution
from dsel_assets.selection.interface import Choice, Selector, State
from dsel_assets.selection.scored import first_of_each
from dsel_assets.selection.strata import Strata
from dsel_assets.selection.strategies import STRATEGIES
from dsel_assets.selection.uncertainty import Entropy

Floats = NDArray[np.float64]

DECIMALS = 12  # of a cosine: what is below is rounding, and would order equal rows


def centred(
    pool: Examples, *others: Examples, centre: Floats | None = None
) -> list[NDArray[np.float32]]:
    """Sketches [., D] of the pool and of others, centred on the pool's mean, then of unit norm.

    Several rows an example, [., k, D], become one. Rows at the mean become zeros.
    centre: [D], a pool's mean, where these are only a part of it.
    """
    centre = centre_of(pool) if centre is None else centre
    return [directions(_rows(part), centre) for part in (pool, *others)]


def centre_of(pool: Examples) -> Floats:
    """[D] mean of the sketches; several rows an example, [., k, D], count as one."""
    found: Floats = _rows(pool).mean(0, dtype=np.float64)
    return found


def _rows(examples: Examples) -> NDArray[np.floating]:
    return np.asarray(examples.sketches).reshape(len(examples), -1)


def mean_cosine(candidates: ArrayLike, targets: ArrayLike) -> Floats:
    """[N] mean over the targets of the cosine to each, in [-1, 1]; of a row of zeros, 0.

    candidates [N, d], targets [m, d], used as given. The errors are those of `attribution`.
    """
    same = np.zeros(len(np.asarray(targets)))
    found = attribution(candidates, targets, how="cosine", groups=same)[:, 0]
    return np.round(found, DECIMALS)


def information_density(entropies: ArrayLike, cosines: ArrayLike, beta: float = 1.0) -> Floats:
    """[N] entropy times cosine^beta, with the cosine's sign where it is negative.

    As ITL's authors have it: the similarity is that to the targets. B. Settles and M. Craven, "An
    Analysis of Active Learning Strategies for Sequence Labeling Tasks", EMNLP 2008, take the mean
    over the pool, which is near 0 for every row once the pool is centred.

    entropies [N] >= 0, cosines [N]; beta > 0 the weight of the similarity, else ValueError.
    """
    if not 0 < beta < np.inf:
        raise ValueError(f"beta = {beta}: it must be positive and finite")
    cosine = np.asarray(cosines, np.float64)
    found: Floats = np.asarray(entropies, np.float64) * np.sign(cosine) * np.abs(cosine) ** beta
    return found


class Cosine(Selector):
    """Takes the largest mean cosine to the targets.

    Of gradient sketches, centred on the pool as in `Itl`.
    """

    traits = STRATEGIES["cosine"]

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """As within one part."""
        return self.choose_within(pool, target, Strata.whole(len(pool), n), seed=seed, warm=warm)

    def choose_within(
        self,
        pool: Examples,
        target: Examples | None,
        strata: Strata,
        *,
        seed: int,
        warm: State | None,
    ) -> Choice:
        """The first of each part in the order of the whole pool."""
        assert target is not None
        scores, spent = self.scores(pool, target)
        order = np.argsort(-next(iter(scores.values())), kind="stable")
        rows = first_of_each(order, strata)
        return Choice(rows, {name: found[rows] for name, found in scores.items()}, spent=spent)

    def scores(self, pool: Examples, target: Examples) -> tuple[Mapping[str, Floats], float]:
        """Columns [N], the first of them that by which is ranked; seconds that an earlier call did.

        Nothing is kept of the cosines: they cost one pass, as a look whether they are known would.
        """
        return {"cosine": mean_cosine(*centred(pool, target))}, 0.0


class InformationDensity(Cosine):
    """Takes what is both uncertain to the base model and like the targets.

    Nothing is trained, so that `trainable` is not read.
    """

    traits = STRATEGIES["information_density"]

    def __init__(
        self, *, model: Builder, trainable: Sequence[str] | None = None, beta: float = 1.0
    ) -> None:
        self.beta, self._entropy = beta, Entropy(model=model)

    def scores(self, pool: Examples, target: Examples) -> tuple[Mapping[str, Floats], float]:
        """Density, and what it is the product of; the entropies of a pool are kept."""
        cosines = super().scores(pool, target)[0]["cosine"]
        ranked = self._entropy.choose(pool, None, len(pool), seed=0, warm=None)
        entropies = np.empty(len(pool))
        entropies[ranked.rows] = ranked.scores["uncertainty"]
        density = information_density(entropies, cosines, self.beta)
        return {"density": density, "cosine": cosines, "entropy": entropies}, ranked.spent
