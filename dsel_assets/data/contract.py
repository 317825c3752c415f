"""What a file must hold, and what becomes of its rows: an example, a duplicate, or quarantine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dsel_assets.data.cells import (
    Column,
    Faults,
    Kind,
    parse_cells,
    parse_cost,
    parse_group,
    parse_inputs,
    parse_label,
    parse_long_text,
    parse_name,
    parse_text,
)
from dsel_assets.data.examples import Examples
from dsel_assets.data.identity import DIGEST_COLUMN, ROW_COLUMN, concatenate, example_ids, first_of
from dsel_assets.data.quarantine import BROKEN_LINE, CONFLICTING_ID, quarantine_table
from dsel_assets.data.readers import MAX_EXTRA, MISSING, RawBatch

Refused = tuple[int, str | None, str, str]  # row, id where it has one, reason, detail


@dataclass(frozen=True)
class Contract:
    """Which columns a file has and what stands in them.

    input    column of the model's input, in one of the forms that `data.cells` names
    label    column of class indices (integers) or names of `classes`; None where rows have no label
             yet: theirs are -1, and their content is the input alone
    group    column of sources (text; null or "" is unknown), or None
    id       column of ids (text of 1 to 200 characters, no control characters), or None: ids are
             hashes of the content
    kind     "image" (integers are divided by 255) or "vector" (numbers as given)
    shape    of one input: (C, H, W) or (H, W) for an image
    classes  names in the order of their indices
    cost     column of what an example costs (finite numbers from 0 up), or None
    names    further columns of text or whole numbers, kept as text; null is ""
    texts    columns of text of any length, as objects

    Raises ValueError for an impossible contract.
    """

    input: str
    label: str | None
    group: str | None
    id: str | None
    kind: Kind
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    cost: str | None = None
    names: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("image", "vector"):
            raise ValueError(f"kind is {self.kind!r}; it must be 'image' or 'vector'")
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape is {self.shape}; give one length or more, each at least 1")
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes are {self.classes}; give one name or more, each once")
        if len(set(self.declared)) < len(self.declared) or {DIGEST_COLUMN, ROW_COLUMN} & {
            self.cost,
            *self.names,
            *self.texts,
        }:
            raise ValueError(
                f"columns are {self.declared}; name each once, and none "
                f"{DIGEST_COLUMN!r} or {ROW_COLUMN!r}"
            )

    @property
    def declared(self) -> tuple[str, ...]:
        """The columns that a file must have; what `read_file` is asked for."""
        optional = (self.label, self.group, self.id, self.cost)
        given = (name for name in optional if name is not None)
        return (self.input, *given, *self.names, *self.texts)


@dataclass(frozen=True)
class Validated:
    """What became of a file: seen == len(examples) + duplicates + quarantine.num_rows.

    examples    the good rows in the order of the file, with columns `row` [N] int64 (its number,
                from 1) and `content_digest` [N] str
    quarantine  (source, row, example_id, reason, detail) of each refused row, in the same order
    duplicates  rows dropped because an earlier one has the same id and the same content
    seen        rows in the file, blank lines aside
    extra       columns that the file has and nobody declared
    """

    examples: Examples
    quarantine: pa.Table
    duplicates: int
    seen: int
    extra: tuple[str, ...] = ()


def validate(raw: Iterable[RawBatch], contract: Contract, source: str) -> Validated:
    """Check one file, as `read_file` gives it; a bad row never costs a good one.

    A row with several faults is quarantined once, for the first in the order of
    `contract.declared`. A column that the file lacks quarantines every row. Of rows with one id the
    first good one is kept; the same content again is a duplicate, other content is quarantined.
    `source` names the file in the quarantine table. Raises what `read_file` raises.
    """
    nothing = RawBatch(np.array([], dtype=np.int64), {name: [] for name in contract.declared})
    examples, refused = _check(nothing, contract)
    parts = [(source, examples)]
    seen, extra = 0, set[str]()
    for batch in raw:
        examples, faulty = _check(batch, contract)
        parts.append((source, examples))
        refused += faulty
        refused += [(row, None, BROKEN_LINE, why) for row, why in batch.broken]
        seen += len(batch.rows) + len(batch.broken)
        extra.update(batch.extra)
    examples = concatenate(parts)
    parts.clear()

    first = first_of(examples.ids)
    again = np.flatnonzero(first != np.arange(len(examples)))
    digests, row = examples.columns[DIGEST_COLUMN], examples.columns[ROW_COLUMN]
    conflicts = again[digests[again] != digests[first[again]]]
    for i in conflicts:
        detail = f"row {row[first[i]]} has other content under this id"
        refused.append((int(row[i]), str(examples.ids[i]), CONFLICTING_ID, detail))
    return Validated(
        examples=examples.take(first == np.arange(len(examples))) if len(again) else examples,
        quarantine=quarantine_table((source, *line) for line in sorted(refused, key=_row)),
        duplicates=len(again) - len(conflicts),
        seen=seen,
        extra=tuple(sorted(extra))[:MAX_EXTRA],
    )


def _row(refused: Refused) -> int:
    return refused[0]


def _check(batch: RawBatch, contract: Contract) -> tuple[Examples, list[Refused]]:
    """Examples of the good rows, duplicates included, and the refused rows."""
    n = len(batch.rows)
    faults: Faults = {}

    def read(name: str, parse: Callable[[Column], tuple[Any, Faults]]) -> Any:
        values, found = parse(batch.columns.get(name, [MISSING] * n))
        for i, (reason, detail) in found.items():
            faults.setdefault(i, (reason, f"column {name!r}: {detail}"))
        return values

    def each(name: str, parse: Callable[[Any], Any]) -> list[Any]:
        return list(read(name, lambda column: parse_cells(column, parse)))

    classes = {name: i for i, name in enumerate(contract.classes)}
    inputs = read(contract.input, lambda c: parse_inputs(c, contract.kind, contract.shape))
    labels = [-1] * n
    if contract.label is not None:
        labels = each(contract.label, lambda cell: parse_label(cell, classes))
    groups = each(contract.group, parse_group) if contract.group is not None else [""] * n
    ids = each(contract.id, parse_text) if contract.id is not None else [None] * n
    costs = {} if contract.cost is None else {contract.cost: each(contract.cost, parse_cost)}
    names = {name: each(name, parse_name) for name in contract.names}
    texts = {name: each(name, parse_long_text) for name in contract.texts}

    good = np.array([i for i in range(n) if i not in faults], dtype=np.int64)
    inputs = inputs if len(good) == n else inputs[good]
    labelled = ["" if contract.label is None else contract.classes[labels[i]] for i in good]
    digests = example_ids(inputs, labelled)
    examples = Examples(
        ids=digests if contract.id is None else np.array([ids[i] for i in good], dtype=np.str_),
        labels=np.array([labels[i] for i in good], dtype=np.int64),
        groups=np.array([groups[i] for i in good], dtype=np.str_),
        inputs=inputs,
        columns={
            **{name: np.array([of[i] for i in good], float) for name, of in costs.items()},
            **{name: np.array([of[i] for i in good], np.str_) for name, of in names.items()},
            **{name: np.array([of[i] for i in good], object) for name, of in texts.items()},
            ROW_COLUMN: batch.rows[good],
            DIGEST_COLUMN: digests,
        },
    )
    refused = [(int(batch.rows[i]), ids[i], *fault) for i, fault in faults.items()]
    return examples, refused
