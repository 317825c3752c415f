"""Strategies that score each example and take the highest."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsel_assets.data.examples import Examples
from dsel_assets.selection.interface import Choice, Ints, Selector, State
from dsel_assets.selection.strata import Strata


@dataclass(frozen=True)
class Ranking:
    """order: [N] positions in the pool, best first; scores: column -> [N], in the pool's order."""

    order: Ints
    scores: Mapping[str, NDArray]
    diagnostics: Mapping[str, Any] = field(default_factory=dict)


class Scored(Selector):
    """Ranks a pool once for all budgets and quotas; subclasses say how."""

    def __init__(self) -> None:
        self._last: tuple[bytes, Ranking, float] = (b"", Ranking(np.array([], np.int64), {}), 0.0)

    @abstractmethod
    def rank(self, pool: Examples, target: Examples | None, seed: int) -> Ranking:
        """Rank every example of the pool, whatever the budget."""

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """The first n of the ranking."""
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
        """The first of each part, as many as its quota, in the order of the whole ranking."""
        key = _digest(seed, pool, target)
        known = self._last[0] == key
        if not known:
            started = time.perf_counter()
            ranking = self.rank(pool, target, seed)
            self._last = key, ranking, time.perf_counter() - started
        _, ranking, seconds = self._last
        rows = first_of_each(ranking.order, strata)
        return Choice(
            rows,
            {name: column[rows] for name, column in ranking.scores.items()},
            ranking.diagnostics,
            spent=seconds if known else 0.0,
        )


def first_of_each(order: Ints, strata: Strata) -> Ints:
    """The first `counts` examples of each part in `order` [N], and in that order."""
    return order[places(strata.of[order]) < strata.counts[strata.of[order]]]


def places(of: NDArray) -> Ints:
    """How many of the same value stand before each entry of `of` [N]."""
    grouped = np.argsort(of, kind="stable")
    _, starts, sizes = np.unique(of[grouped], return_index=True, return_counts=True)
    before = np.empty(len(of), np.int64)
    before[grouped] = np.arange(len(of)) - np.repeat(starts, sizes)
    return before


def _digest(seed: int, *sets: Examples | None) -> bytes:
    found = blake2b(str(seed).encode())
    for examples in filter(None, sets):
        for part in (examples.inputs, examples.sketches, examples.labels):
            if part is not None:
                found.update(f"{part.dtype}{part.shape}".encode())
                found.update(np.ascontiguousarray(part).data)
    return found.digest()
