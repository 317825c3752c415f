"""Rows that were refused, each with its reason: counted and kept, never dropped in silence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import pyarrow as pa

UNREADABLE_FILE: Final = "unreadable file"
BROKEN_LINE: Final = "broken line"
MISSING_COLUMN: Final = "missing column"
WRONG_TYPE: Final = "wrong type"
WRONG_SHAPE: Final = "wrong shape"
UNKNOWN_LABEL: Final = "unknown label"
EMPTY: Final = "empty"
NON_FINITE: Final = "non-finite"
CONFLICTING_ID: Final = "conflicting id"
LEAK: Final = "leak"
ZERO_GRADIENT: Final = "zero gradient"
NON_FINITE_GRADIENT: Final = "non-finite gradient"
REASONS: Final = (
    UNREADABLE_FILE,
    BROKEN_LINE,
    MISSING_COLUMN,
    WRONG_TYPE,
    WRONG_SHAPE,
    UNKNOWN_LABEL,
    EMPTY,
    NON_FINITE,
    CONFLICTING_ID,
    LEAK,
    ZERO_GRADIENT,
    NON_FINITE_GRADIENT,
)

QUARANTINE_SCHEMA: Final = pa.schema(
    [
        ("source", pa.string()),
        ("row", pa.int64()),
        ("example_id", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


def quarantine_table(rows: Iterable[tuple[str, int | None, str | None, str, str]]) -> pa.Table:
    """A table of (source, row, example_id, reason, detail), one line a refused row.

    source is a file or an arrival; row counts from 1 and is null for a whole file or a stored
    example; example_id is null where the row never got one; reason is one of REASONS.
    """
    return table_of(rows, QUARANTINE_SCHEMA)


def table_of(rows: Iterable[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    """An Arrow table from rows of values in the order of the schema; no rows, an empty table."""
    names = schema.names
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=schema)
