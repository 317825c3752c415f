"""What comes in: files into rows, rows into examples with an id, or quarantine with a reason."""

from dsel_assets.data.contract import Contract, Validated, validate
from dsel_assets.data.examples import Examples
from dsel_assets.data.identity import DIGEST_COLUMN, ROW_COLUMN, concatenate, example_ids, merge
from dsel_assets.data.leaks import find_leaks, near_duplicates
from dsel_assets.data.quarantine import (
    BROKEN_LINE,
    CONFLICTING_ID,
    EMPTY,
    LEAK,
    MISSING_COLUMN,
    NON_FINITE,
    NON_FINITE_GRADIENT,
    QUARANTINE_SCHEMA,
    REASONS,
    UNKNOWN_LABEL,
    UNREADABLE_FILE,
    WRONG_SHAPE,
    WRONG_TYPE,
    ZERO_GRADIENT,
    quarantine_table,
)
from dsel_assets.data.readers import RawBatch, UnreadableFileError, file_digest, read_file

__all__ = [
    "BROKEN_LINE",
    "CONFLICTING_ID",
    "DIGEST_COLUMN",
    "EMPTY",
    "LEAK",
    "MISSING_COLUMN",
    "NON_FINITE",
    "NON_FINITE_GRADIENT",
    "QUARANTINE_SCHEMA",
    "REASONS",
    "ROW_COLUMN",
    "UNKNOWN_LABEL",
    "UNREADABLE_FILE",
    "WRONG_SHAPE",
    "WRONG_TYPE",
    "ZERO_GRADIENT",
    "Contract",
    "Examples",
    "RawBatch",
    "UnreadableFileError",
    "Validated",
    "concatenate",
    "example_ids",
    "file_digest",
    "find_leaks",
    "merge",
    "near_duplicates",
    "quarantine_table",
    "read_file",
    "validate",
]
