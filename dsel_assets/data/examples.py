"""The one type that data travels in: a table of examples, column by column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Examples:
    """Examples with an id each; every array has the same first dimension N.

    ids      [N] str, distinct
    inputs   [N, ...] float32 (what the model reads), or None where only sketches are needed
    labels   [N] int64 class indices
    groups   [N] str, the source of each example ("" where unknown)
    sketches [N, D] float16/32/64 gradient sketches, or None
    columns  further columns by name, [N] each (a cost, say)
    """

    ids: NDArray[np.str_]
    labels: NDArray[np.int64]
    groups: NDArray[np.str_]
    inputs: NDArray[np.float32] | None = None
    sketches: NDArray[np.floating] | None = None
    columns: dict[str, NDArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_] | Sequence[int]) -> Examples:
        """The examples at these positions (or under this mask), in this order.

        All of them as they are: the same object, as its arrays may be large.
        """
        rows = np.asarray(rows, dtype=None if len(rows) else np.int64)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        if np.array_equal(rows, np.arange(len(self))):
            return self
        return replace(
            self,
            ids=self.ids[rows],
            labels=self.labels[rows],
            groups=self.groups[rows],
            inputs=None if self.inputs is None else self.inputs[rows],
            sketches=None if self.sketches is None else self.sketches[rows],
            columns={name: column[rows] for name, column in self.columns.items()},
        )
