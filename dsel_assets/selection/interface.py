"""One interface for every strategy: pool, target and budget in, a selection out."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dsel_assets.data.examples import Examples
from dsel_assets.selection.strata import Strata
from dsel_assets.selection.strategies import Needs, Strategy

if TYPE_CHECKING:
    from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
State = Mapping[str, NDArray]


@dataclass(frozen=True)
class Budget:
    """How much may be chosen: a number of examples, or a sum over the column `cost`."""

    limit: float
    cost: str | None = None


@dataclass(frozen=True)
class Constraints:
    """What a selection must keep to.

    quotas    one column ("label", "group" or another of the pool's) -> value -> exactly so many
              examples; what they leave of the budget is filled with other values
    required  ids that are chosen first
    forbidden ids that are never chosen
    """

    quotas: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    forbidden: frozenset[str] = frozenset()


NONE = Constraints()
PASSED = "passed_over"  # in the state of a strategy that follows: some ids that it did not keep
FEW = 32
TRIES = 6  # selections that look for the size that a cost budget pays for
READS = {"sketches": Needs.SKETCHES, "inputs": Needs.MODEL}  # arrays that a score is made of


@dataclass(frozen=True)
class Selection:
    """What was chosen and why.

    ids         [n] str, distinct, in the order of choice
    weights     [n] float64 training weights, mean 1
    scores      column -> [n]: why each was chosen (rank, gain, nearest target, ...)
    diagnostics objective, convergence, coverage, seconds
    state       what a warm start needs after the next arrival
    model       weights by name of a model that was trained along and stands for the result; None:
                finetune on what was chosen
    """

    ids: NDArray[np.str_]
    weights: Floats
    scores: Mapping[str, NDArray]
    diagnostics: Mapping[str, Any]
    state: State = field(default_factory=dict)
    model: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Choice:
    """A strategy's own answer: positions in the pool it was handed, the rest as in `Selection`.

    weights: [n] of training, of mean 1; None: all alike
    stopped: there are fewer than asked for because no more are worth it
    spent: seconds of work that this choice rests on and that an earlier call did
    """

    rows: Ints
    scores: Mapping[str, NDArray] = field(default_factory=dict)
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    state: State = field(default_factory=dict)
    spent: float = 0.0
    weights: Floats | None = None
    model: Mapping[str, Tensor] | None = None
    stopped: bool = False


class Selector(ABC):
    """A strategy. Subclasses choose; what holds for all of them is done here, once.

    The pool is sorted by id, so that the order of its rows never matters. Forbidden ids are taken
    out and required ones come first. A budget of everything or more takes everything.

    scratch: a folder for what a repeated call goes on from if this one is killed; none: it begins
    anew.
    """

    scratch: Path | None = None

    traits: ClassVar[Strategy]

    @property
    def name(self) -> str:
        """What the strategy is called."""
        return self.traits.name

    def objective(self, chosen: Examples, target: Examples | None, own: Selection) -> float | None:
        """How good these examples are, whoever chose them, by what this strategy aims at.

        own: its selection from the pool that they are of, so that other examples are judged by the
        same measure. None where it has no such number.
        """
        return None

    def can_go_on(self, state: State) -> bool:
        """Whether a later selection can start from this one's state."""
        return bool(state) and (PASSED in state or not self.traits.follows)

    def size(self, limit: int, rows: int) -> int:
        """How many of `rows` examples are chosen under a limit; some baselines ignore it."""
        return min(limit, rows)

    @abstractmethod
    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """Choose n of the pool's rows; the pool is clean and sorted by id.

        0 < n < len(pool), and n = len(pool) where the order of everything matters: if `nested`.
        """

    def choose_within(
        self,
        pool: Examples,
        target: Examples | None,
        strata: Strata,
        *,
        seed: int,
        warm: State | None,
    ) -> Choice:
        """Choose so many of each part of the pool, as quotas ask.

        Here each part on its own, in turns that keep the shares; a strategy that can weigh the
        parts against each other does better.
        """
        parts = []
        for part in np.flatnonzero(strata.counts):
            rows, n = np.flatnonzero(strata.of == part), int(strata.counts[part])
            if n == len(rows) and not self.traits.nested:
                parts.append((rows, Choice(np.arange(n))))
            else:
                found = self.choose(pool.take(rows), target, n, seed=seed, warm=warm)
                parts.append((rows, found))
        turn = np.concatenate([(np.arange(len(c.rows)) + 0.5) / len(c.rows) for _, c in parts])
        order = np.argsort(turn, kind="stable")
        shared = set.intersection(*(set(choice.scores) for _, choice in parts))
        return Choice(
            np.concatenate([rows[choice.rows] for rows, choice in parts])[order],
            {
                name: np.concatenate([choice.scores[name] for _, choice in parts])[order]
                for name in sorted(shared)
            },
            spent=sum(choice.spent for _, choice in parts),
        )

    def select(
        self,
        pool: Examples,
        target: Examples | None,
        budget: Budget,
        *,
        constraints: Constraints = NONE,
        seed: int,
        warm: State | None = None,
    ) -> Selection:
        """Choose within the budget.

        warm: the state of an earlier selection. A strategy that `follows` is then handed, instead
        of the pool, the examples that the state names and those that have come since.

        ValueError for an empty pool, repeated ids, a negative or fractional budget, something
        needed that is not there, a non-finite row (named), and for a constraint that this strategy
        can't honour.
        A budget above the pool warns and takes everything.
        """
        started = time.perf_counter()
        order = np.argsort(pool.ids, kind="stable")
        pool = pool.take(order[~np.isin(pool.ids[order], sorted(constraints.forbidden))])
        self._check(pool, target, constraints)
        followed = warm is not None and self.traits.follows
        if warm is not None and followed:
            if not self.can_go_on(warm):
                raise ValueError(f"{self.name}: a choice under constraints can't be gone on from")
            if np.isin(warm[PASSED], pool.ids).any():
                raise ValueError(
                    f"{self.name} goes on from an earlier selection: hand in the examples that its "
                    "state names and those that have come since, without what was passed over"
                )
        if budget.cost is not None and constraints.quotas:
            raise ValueError(f"{self.name} can't honour quotas under a cost budget")
        limit = self._limit(budget, len(pool))
        size = self.size(limit, len(pool))
        if size == len(pool) < limit:
            warnings.warn(
                f"{self.name}: a budget of {limit} takes all {size} examples", stacklevel=2
            )
        first = np.flatnonzero(np.isin(pool.ids, sorted(constraints.required)))
        if len(first) > size:
            raise ValueError(f"{self.name} can't honour {len(first)} required ids: it takes {size}")
        rest = np.setdiff1d(np.arange(len(pool)), first)
        n = size - len(first)
        strata = self._strata(pool, first, size, constraints)

        def choose(of: Examples, n: int) -> Choice:
            if n == 0:
                return Choice(np.array([], dtype=np.int64))
            if n == len(of) and not (self.traits.nested or followed):
                return Choice(np.arange(n))
            if strata is not None:
                return self.choose_within(of, target, strata, seed=seed, warm=warm)
            return self.choose(of, target, n, seed=seed, warm=warm)

        if budget.cost is None or self.traits.whole:
            choice = choose(pool.take(rest), n)
        else:
            costs = column_of(pool, budget.cost).astype(np.float64)
            left = budget.limit - costs[first].sum()
            if left < 0:
                raise ValueError(
                    f"{self.name} can't honour {len(first)} required ids: they cost "
                    f"{costs[first].sum():g}, the budget is {budget.limit:g}"
                )
            rest = rest[costs[rest] <= left]  # the others never fit
            choice = self._within_cost(pool.take(rest), costs[rest], left, choose)
            n = len(choice.rows) + choice.stopped
        rows = np.concatenate([first, rest[choice.rows]])
        fewer = choice.stopped and len(choice.rows) < n
        if len(np.unique(rows)) != len(rows) or (len(choice.rows) != n and not fewer):
            raise AssertionError(
                f"{self.name} chose {len(choice.rows)} rows that are not {n} distinct ones"
            )
        seconds = time.perf_counter() - started + choice.spent
        scores = {name: _after(len(first), column) for name, column in choice.scores.items()}
        weights = np.ones(len(choice.rows)) if choice.weights is None else choice.weights
        state = choice.state
        # of what constraints kept out, a later choice may need more than what has come since
        if state and self.traits.follows and constraints == NONE and budget.cost is None:
            passed = pool.ids[~np.isin(pool.ids, state["ids"])]
            passed = passed if warm is None else np.append(warm[PASSED], passed)
            state = {**state, PASSED: passed[:FEW]}
        return Selection(
            ids=pool.ids[rows],
            weights=np.append(np.ones(len(first)), weights),
            scores={"rank": np.arange(1, len(rows) + 1)} | scores,
            diagnostics={
                **choice.diagnostics,
                **({"stopped": fewer} if choice.stopped else {}),
                "seconds": seconds,
            },
            state=state,
            model=choice.model,
        )

    def _within_cost(
        self,
        pool: Examples,
        costs: Floats,
        limit: float,
        choose: Callable[[Examples, int], Choice],
    ) -> Choice:
        """The largest choice that the limit pays for: it ends before the first that does not fit.

        Of a nested strategy's ranking that is the longest beginning. Of others, whose larger choice
        is not the smaller one and more, a few sizes near the limit are tried.
        """
        most = int(np.searchsorted(np.cumsum(np.sort(costs)), limit, side="right"))
        best, low, high = choose(pool, 0), 0, most + 1
        size = min(most, int(1.25 * limit / max(costs.mean(), 1e-300)) + 1) if most else 0
        tries, spent_before = 0, None
        while high - low > 1 and (self.traits.nested or tries < TRIES or low == 0):
            tries += 1
            found = choose(pool, size)
            # later tries rest on work that the first one did within this call
            spent_before = found.spent if spent_before is None else spent_before
            spent = np.cumsum(costs[found.rows])
            fits = int(np.searchsorted(spent, limit, side="right"))
            if fits == len(found.rows):
                best, low = found, size
                if found.stopped and len(found.rows) < size:
                    return replace(best, spent=spent_before)
            else:
                high = fits + 1 if self.traits.nested else size
            if self.traits.nested and fits < size:
                size = fits
            else:
                guess = int(size * limit / spent[-1]) if spent[-1] > 0 else most
                grown = 2 * size if self.traits.nested else low + 1
                size = min(max(guess, grown, low + 1), high - 1)
        return replace(best, spent=spent_before or 0.0, stopped=False)

    def _strata(
        self, pool: Examples, first: Ints, size: int, constraints: Constraints
    ) -> Strata | None:
        """The quotas over the rows that are not required; those count towards them."""
        if not constraints.quotas:
            return None
        if self.traits.whole or len(constraints.quotas) > 1:
            raise ValueError(f"{self.name} can't honour quotas ({', '.join(constraints.quotas)})")
        [(column, quotas)] = constraints.quotas.items()
        whole = Strata.of_quotas(column, column_of(pool, column), quotas, size)
        already = np.bincount(whole.of[first], minlength=len(whole.counts))
        if (already > whole.counts).any():
            raise ValueError(
                f"{self.name}: more ids are required than the quotas of {column} allow"
            )
        rest = np.delete(whole.of, first)
        return Strata(rest, whole.counts - already)

    def _limit(self, budget: Budget, rows: int) -> int:
        if budget.cost is not None:
            if not 0 <= budget.limit < np.inf:
                raise ValueError(f"a budget is a finite number from 0, not {budget.limit}")
            return rows
        if budget.limit < 0 or not float(budget.limit).is_integer():
            raise ValueError(f"a budget is a whole number of examples from 0, not {budget.limit}")
        return int(budget.limit)

    def _check(self, pool: Examples, target: Examples | None, constraints: Constraints) -> None:
        if len(pool) == 0:
            raise ValueError(f"{self.name}: the pool is empty; nothing can be chosen")
        repeated = pool.ids[1:][pool.ids[1:] == pool.ids[:-1]]
        if len(repeated):
            raise ValueError(f"ids of the pool repeat: {', '.join(repeated[:5])}")
        missing = constraints.required.difference(pool.ids.tolist())
        if missing:
            raise ValueError(f"required ids are not in the pool: {', '.join(sorted(missing)[:5])}")
        read = {"pool": pool}
        if Needs.TARGET in self.traits.needs:
            if target is None or len(target) == 0:
                raise ValueError(f"{self.name} needs a target set, and there is none")
            read["target"] = target
        for what, examples in read.items():
            for part in (part for part, need in READS.items() if need in self.traits.needs):
                if getattr(examples, part) is None:
                    raise ValueError(f"{self.name} needs {part} of the {what}")
                refuse_non_finite(getattr(examples, part), examples.ids, what)


def column_of(pool: Examples, name: str) -> NDArray:
    """A column of the pool by name; ValueError names those that there are."""
    columns = {"label": pool.labels, "group": pool.groups, **pool.columns}
    if name not in columns:
        raise ValueError(f"the pool has no column {name!r}; it has {', '.join(columns)}")
    return columns[name]


def refuse_non_finite(rows: NDArray, ids: NDArray[np.str_], what: str) -> None:
    """Raise ValueError naming the ids of rows that hold NaN or infinity: they get no score."""
    bad = ~np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))
    if bad.any():
        named = ", ".join(ids[bad][:5])
        raise ValueError(f"{bad.sum()} rows of the {what} are not finite: {named}")


def _after(first: int, column: NDArray) -> NDArray:
    """The column with room before it for the required rows, which have no score."""
    if first == 0:
        return column
    empty = np.full(
        first, np.nan if column.dtype.kind == "f" else ("" if column.dtype.kind == "U" else -1)
    )
    return np.concatenate([empty.astype(column.dtype), column])
