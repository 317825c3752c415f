"""What every strategy is held against: a uniform draw, everything, nothing."""

from __future__ import annotations

import numpy as np

from dsel_assets.data.examples import Examples
from dsel_assets.selection.interface import Choice, Selector, State
from dsel_assets.selection.strategies import STRATEGIES


class Random(Selector):
    """A uniform draw without replacement; a smaller budget is a prefix of a larger one."""

    traits = STRATEGIES["random"]

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """The first n of a seeded permutation."""
        return Choice(np.random.default_rng(seed).permutation(len(pool))[:n])


class Full(Selector):
    """The whole pool, whatever the budget."""

    traits = STRATEGIES["full"]

    def size(self, limit: int, rows: int) -> int:
        """All of them."""
        return rows

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """Never asked: there is nothing to choose."""
        raise AssertionError


class TargetOnly(Selector):
    """Nothing from the pool: training then sees the target set alone."""

    traits = STRATEGIES["target_only"]

    def size(self, limit: int, rows: int) -> int:
        """None of them."""
        return 0

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """Never asked: there is nothing to choose."""
        raise AssertionError
