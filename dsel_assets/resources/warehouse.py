"""One DuckDB file: views over the store's Parquet files and the SQL models' tables.

Files are the truth: the warehouse can be deleted and is made again from them. DuckDB lets one
process write and then shuts out all others, readers too, so every connection here is short.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import duckdb

SOURCES: Mapping[str, Mapping[str, str]] = {
    "arrivals": {
        "task": "varchar",
        "arrival": "varchar",
        "file": "varchar",
        "digest": "varchar",
        "seen": "bigint",
        "rows": "bigint",
        "duplicates": "bigint",
        "quarantined": "bigint",
        "held_back": "varchar",
    },
    "generations": {
        "task": "varchar",
        "generation": "bigint",
        "position": "bigint",
        "arrival": "varchar",
        "pool": "varchar",
        "gradients": "varchar",
    },
    "pool": {
        "task": "varchar",
        "arrival": "varchar",
        "artifact": "varchar",
        "example_id": "varchar",
        "row": "bigint",
        "label": "bigint",
        "label_name": "varchar",
        "source": "varchar",
        "content_digest": "varchar",
    },
    "quarantine": {
        "task": "varchar",
        "arrival": "varchar",
        "source": "varchar",
        "row": "bigint",
        "example_id": "varchar",
        "reason": "varchar",
        "detail": "varchar",
    },
    "gradients": {
        "task": "varchar",
        "artifact": "varchar",
        "example_id": "varchar",
        "loss": "float",
        "norm": "float",
    },
    "duplicates": {
        "task": "varchar",
        "generation": "bigint",
        "example_id": "varchar",
        "arrival": "varchar",
        "first_arrival": "varchar",
    },
    "truth": {
        "task": "varchar",
        "arrival": "varchar",
        "row": "bigint",
        "true_label": "bigint",
        "flipped": "boolean",
        "duplicate_of": "bigint",
        "off_task": "boolean",
    },
    "selected": {
        "task": "varchar",
        "selection": "varchar",
        "example_id": "varchar",
        "weight": "double",
        "rank": "bigint",
    },
    "cells": {
        "task": "varchar",
        "generation": "bigint",
        "strategy": "varchar",
        "budget": "bigint",
        "seed": "bigint",
        "selection": "varchar",
        "checkpoint": "varchar",
        "metric": "varchar",
        "chosen": "bigint",
        "whole": "boolean",
        "stopped": "boolean",
        "budget_in": "varchar",
        "cost": "double",
        "aim": "varchar",
        "objective": "double",
        "objective_before": "double",
        "select_seconds": "double",
        "sketch_seconds": "double",
        "train_seconds": "double",
        "validation_accuracy": "double",
        "validation_macro_f1": "double",
        "validation_loss": "double",
        "validation_calibration_error": "double",
        "test_accuracy": "double",
        "test_macro_f1": "double",
        "test_loss": "double",
        "test_calibration_error": "double",
    },
    "comparisons": {
        "task": "varchar",
        "generation": "bigint",
        "strategy": "varchar",
        "budget": "bigint",
        "split": "varchar",
        "metric": "varchar",
        "confidence": "double",
        "diff": "double",
        "diff_low": "double",
        "diff_high": "double",
        "p": "double",
        "p_holm": "double",
        "corrected": "boolean",
        "verdict": "varchar",
    },
}
"""The views that there always are: columns and their DuckDB types."""

EXAMPLES = 10  # rows of a table, or of a check's violations, that are shown
IN_USE = ("lock on file", "another process", "different configuration")  # as DuckDB words it


class WarehouseError(RuntimeError):
    """A view, a model or a check can't be run, or the file is in use; the message says which."""


@dataclass(frozen=True)
class Sample:
    """The first rows of a query's result, how many there are in all, and the columns' types."""

    count: int
    columns: dict[str, str]
    rows: list[tuple[Any, ...]]


@dataclass(frozen=True)
class Built:
    """What building a table gave: its rows, and for each check those that violate it."""

    table: Sample
    violations: dict[str, Sample]

    @property
    def published(self) -> bool:
        """Whether every check passed, so that the table is the one that readers see."""
        return not any(found.count for found in self.violations.values())


@dataclass(frozen=True)
class Warehouse:
    """The DuckDB file at `path`; `wait` is how many seconds to wait for another process's lock."""

    path: Path
    wait: float = 60.0

    @contextmanager
    def connect(self, read_only: bool = False) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection of two threads, for the length of the block.

        Waits while another process holds the file, then raises WarehouseError with its process id.
        """
        connection = self._open(read_only)
        try:
            yield connection
        finally:
            connection.close()

    def initialise(self) -> None:
        """Create the file, with a view without rows for every source that has none yet."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.connect() as connection:
            connection.begin()
            for name in SOURCES:
                connection.execute(f"create view if not exists {name} as {_view(name, [])}")
            connection.commit()

    def publish_views(self, files: Mapping[str, Sequence[Path]]) -> None:
        """Point views at these Parquet files, all in one transaction; other views stay.

        Columns that only some files have are null in the others; columns beyond those in SOURCES
        follow them. WarehouseError for a view that SOURCES does not know, and for files that are
        missing or lack a column.
        """
        import duckdb

        with self.connect() as connection:
            connection.begin()
            for name, paths in files.items():
                if name not in SOURCES:
                    raise WarehouseError(f"no view {name!r}; there are {', '.join(SOURCES)}")
                try:
                    connection.execute(f"create or replace view {name} as {_view(name, paths)}")
                except duckdb.Error as error:
                    raise WarehouseError(f"view {name}: {error}") from error
            connection.commit()

    def build(self, name: str, query: str, checks: Mapping[str, str]) -> Built:
        """Write, audit, publish: make the table, run the checks on it, keep it if all of them pass.

        Each check is a query by its name, whose rows are the violations; it finds the new table
        under its final name. No query ends in a semicolon. All of it is one transaction: a failing
        check, an error or a crash leaves the table that was there, and nobody else ever sees the
        one that failed.
        """
        with self.connect() as connection:
            connection.begin()
            _run(connection, name, f"create or replace table {name} as {query}")
            built = Built(
                _sample(connection, name, f"from {name}"),
                {check: _sample(connection, check, rule) for check, rule in checks.items()},
            )
            if built.published:
                connection.commit()
            else:
                connection.rollback()
        return built

    def schemas(self) -> dict[str, dict[str, str]]:
        """Columns and types of every view and table that is there now."""
        with self.connect(read_only=True) as connection:
            rows = connection.execute(
                "select table_name, column_name, data_type from information_schema.columns "
                "where table_schema = 'main' order by table_name, ordinal_position"
            ).fetchall()
        found: dict[str, dict[str, str]] = {}
        for table, column, kind in rows:
            found.setdefault(table, {})[column] = kind
        return found

    def _open(self, read_only: bool) -> duckdb.DuckDBPyConnection:
        import duckdb

        config: dict[str, Any] = {"threads": 2, "memory_limit": "2GB"}
        deadline, pause = time.monotonic() + self.wait, 0.05
        while True:
            try:
                return duckdb.connect(str(self.path), read_only=read_only, config=config)
            except (duckdb.IOException, duckdb.ConnectionException) as error:
                if not any(sign in str(error) for sign in IN_USE):
                    raise WarehouseError(f"{self.path}: {error}") from error
                if time.monotonic() + pause > deadline:
                    raise WarehouseError(
                        f"{self.path} was in use for {self.wait:g} s; close the process that holds "
                        f"it (a DuckDB shell, another run) and try again: {error}"
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, 1.0)


def _view(view: str, paths: Sequence[Path]) -> str:
    columns = SOURCES[view]
    if not paths:
        nothing = ", ".join(f"cast(null as {kind}) as {name}" for name, kind in columns.items())
        return f"select {nothing} where false"
    typed = ", ".join(f"cast({name} as {kind}) as {name}" for name, kind in columns.items())
    quoted = ", ".join("'" + str(path).replace("'", "''") + "'" for path in paths)
    return (
        f"select {typed}, * exclude ({', '.join(columns)}) "
        f"from read_parquet([{quoted}], union_by_name = true, hive_partitioning = false)"
    )


def _run(connection: duckdb.DuckDBPyConnection, name: str, query: str) -> list[tuple[Any, ...]]:
    import duckdb

    try:
        return connection.execute(query).fetchall()
    except duckdb.Error as error:
        raise WarehouseError(f"{name}: {error}") from error


def _sample(connection: duckdb.DuckDBPyConnection, name: str, query: str) -> Sample:
    ((count,),) = _run(connection, name, f"select count(*) from (\n{query}\n)")
    rows = _run(connection, name, f"select * from (\n{query}\n) limit {EXAMPLES}")
    columns = {column: str(kind) for column, kind, *_ in connection.description or ()}
    return Sample(count, columns, rows)
