"""Quotas: how many examples to choose of each part of a pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Quota = int | float


@dataclass(frozen=True)
class Strata:
    """Disjoint parts of a pool of N examples, and how many are to be chosen of each.

    of      [N] int64, the part of each example, 0 ... K - 1
    counts  [K] int64, of sum n; none above the size of its part

    Raises ValueError, naming the part, where it does not fit together.
    """

    of: Ints
    counts: Ints

    def __post_init__(self) -> None:
        parts = len(self.counts)
        if len(self.of) and not (self.of.min() >= 0 and self.of.max() < parts):
            raise ValueError(
                f"parts must be 0 ... {parts - 1}, not {self.of.min()} ... {self.of.max()}"
            )
        for part, (asked, there) in enumerate(zip(self.counts, self.sizes(), strict=True)):
            if not 0 <= asked <= there:
                raise ValueError(f"part {part}: {asked} of {there} examples can't be chosen")

    @property
    def n(self) -> int:
        """How many are chosen in all."""
        return int(self.counts.sum())

    def sizes(self) -> Ints:
        """[K] how many examples each part has."""
        return np.bincount(self.of, minlength=len(self.counts))

    @classmethod
    def whole(cls, rows: int, n: int) -> Strata:
        """One part: no quota."""
        return cls(np.zeros(rows, np.int64), np.array([n]))

    @classmethod
    def of_quotas(cls, column: str, values: NDArray, quotas: Mapping[str, int], n: int) -> Strata:
        """Of each value that has a quota exactly so many; what is left of n, of the other values.

        values: [N] of the column, compared as text. ValueError, naming value and column, where a
        quota is above what is there, or the quotas do not leave room for n.
        """
        text = np.asarray(values).astype(str)
        counts = []
        of = np.full(len(text), len(quotas), np.int64)
        for part, (value, asked) in enumerate(quotas.items()):
            rows = text == str(value)
            if not 0 <= asked <= rows.sum():
                raise ValueError(f"quota {asked} of {column} = {value}: the pool has {rows.sum()}")
            of[rows] = part
            counts.append(asked)
        rest, others = n - sum(counts), int((of == len(quotas)).sum())
        if not 0 <= rest <= others:
            raise ValueError(
                f"quotas of {column} leave {rest} of {n} to {others} examples of other values"
            )
        return cls(of, np.array([*counts, rest], np.int64))


def fill_quotas(
    asked: Mapping[str, Quota], values: NDArray, n: int
) -> tuple[dict[str, int], dict[str, int]]:
    """How many of each value to choose so that n are chosen, and how many each is short of.

    asked: of values [N] (text), a number of examples, or a share of n (a float), rounded down; of
    the examples that this leaves over the largest remainders get one each. What a value can't
    fill, and what quotas of all values leave open, goes to values without a quota, and beyond
    those to the others in proportion to the room they have. More than n in all is cut in
    proportion.
    """
    there = {value: int(np.count_nonzero(values == value)) for value in asked}
    shares = {v: q for v, q in asked.items() if isinstance(q, float)}
    wanted = {v: int(q) for v, q in asked.items() if v not in shares}
    wanted |= _whole({v: q * n for v, q in shares.items()}, round(sum(shares.values()) * n))
    if sum(wanted.values()) > n:
        total = sum(wanted.values())
        wanted = _whole({v: k * n / total for v, k in wanted.items()}, n)
    counts = {v: min(k, there[v]) for v, k in wanted.items()}
    short = {v: k - counts[v] for v, k in wanted.items() if k > counts[v]}
    spill = n - sum(counts.values()) - (len(values) - sum(there.values()))
    if spill > 0:
        room = {v: there[v] - k for v, k in counts.items()}
        more = _whole({v: spill * k / sum(room.values()) for v, k in room.items()}, spill)
        counts = {v: k + more[v] for v, k in counts.items()}
    return counts, short


def _whole(parts: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers near these, of this sum; the largest remainders are rounded up."""
    found = {value: int(part) for value, part in parts.items()}
    rest: Any = sorted(parts, key=lambda value: found[value] - parts[value])
    for value in rest[: max(0, total - sum(found.values()))]:
        found[value] += 1
    return found
