"""Rows out of Parquet and JSONL files, a batch at a time.

A line that cannot be parsed costs one row; a file that cannot be read is an error of its own.
Nothing here judges values: that is `contract.validate`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

MISSING: Final = object()  # a JSON object without the key; null is None
BATCH_ROWS: Final = 8192
BATCH_BYTES: Final = 64 * 2**20
MAX_LINE_BYTES: Final = 64 * 2**20
MAX_EXTRA: Final = 100


class UnreadableFileError(Exception):
    """No row of this file can be trusted: truncated, corrupt, or of another format.

    path  the file
    why   what is wrong with it
    """

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)
        self.path, self.why = path, why

    def __str__(self) -> str:
        return f"cannot read {self.path}: {self.why}. Deliver the file again, or remove it."


@dataclass(frozen=True)
class RawBatch:
    """Some consecutive rows of a file, as they stand there.

    rows     [n] int64, counted from 1: the row of a Parquet file, the line of a JSONL file
    columns  declared columns by name, n cells each (an Arrow array, or parsed JSON with MISSING
             where a line lacks the key); a column that the file lacks is absent
    broken   (line, why) of each line that is no JSON object; these are not among `rows`
    extra    names of columns that nobody declared, at most MAX_EXTRA
    """

    rows: NDArray[np.int64]
    columns: dict[str, pa.Array | list[Any]]
    broken: tuple[tuple[int, str], ...] = ()
    extra: tuple[str, ...] = ()


def read_file(path: str, columns: Sequence[str]) -> Iterator[RawBatch]:
    """The declared columns of a `.parquet`, `.jsonl` or `.jsonl.gz` file, in bounded batches.

    `path` is a local path or a URL that fsspec knows. A file without rows gives no rows, which is
    fine; blank lines of JSONL are skipped. Raises UnreadableFileError for a file that is corrupt,
    truncated or of another format, possibly after some batches: drop those. Errors of access (not
    found, no permission, connection lost) are raised as they come, since trying again may help.
    """
    match = re.search(r"\.(parquet|jsonl|jsonl\.gz)(\?|$)", path.lower())
    if match is None:
        raise UnreadableFileError(path, "its name does not end in .parquet, .jsonl or .jsonl.gz")
    try:
        with _open(path) as file:
            if match[1] == "parquet":
                yield from _read_parquet(path, file, columns)
            elif match[1] == "jsonl":
                yield from _read_jsonl(file, columns)
            else:
                if not file.read(1):
                    raise UnreadableFileError(path, "it is empty, which no gzip file is")
                file.seek(0)
                with gzip.open(file) as lines:
                    yield from _read_jsonl(lines, columns)
    except (FileNotFoundError, PermissionError, ConnectionError, TimeoutError):
        raise
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UnreadableFileError(path, " ".join(str(error).split())) from error


def file_digest(path: str) -> str:
    """SHA-256 of a file's bytes, 64 hex digits; `path` as in `read_file`."""
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _open(path: str) -> IO[bytes]:
    # a local name may hold the characters that fsspec reads as globs and chains
    return fsspec.open(path, "rb").open() if "://" in path else open(path, "rb")


def _read_parquet(path: str, file: IO[bytes], columns: Sequence[str]) -> Iterator[RawBatch]:
    parquet = pq.ParquetFile(file, page_checksum_verification=True)
    names = parquet.schema_arrow.names
    for name in columns:
        if names.count(name) > 1:
            raise UnreadableFileError(path, f"column {name!r} stands there more than once")
    present = [name for name in columns if name in names]
    extra = tuple(_printable(name) for name in names if name not in columns)[:MAX_EXTRA]
    groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
    row_bytes = sum(group.total_byte_size for group in groups) / max(parquet.metadata.num_rows, 1)
    batch_rows = int(np.clip(BATCH_BYTES / max(row_bytes, 1), 1, BATCH_ROWS))
    start = 1
    # where no declared column is there, any one tells how many rows fail
    for batch in parquet.iter_batches(batch_rows, columns=present or names[:1]):
        rows = np.arange(start, start + batch.num_rows)
        yield RawBatch(rows, {name: batch.column(name) for name in present}, extra=extra)
        start += batch.num_rows


def _read_jsonl(file: IO[bytes] | gzip.GzipFile, columns: Sequence[str]) -> Iterator[RawBatch]:
    lines: list[tuple[int, dict[str, Any] | str]] = []
    size = 0
    for number, line in enumerate(_lines(file), 1):
        if line is not None and not line.strip():
            continue
        lines.append((number, _parse(line)))
        size += len(line or b"")
        if len(lines) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield _pack(lines, columns)
            lines, size = [], 0
    if lines:
        yield _pack(lines, columns)


def _lines(file: IO[bytes] | gzip.GzipFile) -> Iterator[bytes | None]:
    """The lines of a file, None for one that is longer than MAX_LINE_BYTES."""
    first = True
    while line := file.readline(MAX_LINE_BYTES):
        if first:
            line, first = line.removeprefix(b"\xef\xbb\xbf") or b"\n", False
        whole = True
        while len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            whole, line = False, file.readline(MAX_LINE_BYTES)
        yield line if whole else None


def _parse(line: bytes | None) -> dict[str, Any] | str:
    """The JSON object on a line, or what is wrong with it."""
    if line is None:
        return f"longer than {MAX_LINE_BYTES} bytes"
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return str(error)
    return record if isinstance(record, dict) else f"a JSON {type(record).__name__}, not an object"


def _pack(lines: Sequence[tuple[int, dict[str, Any] | str]], columns: Sequence[str]) -> RawBatch:
    good = [(number, record) for number, record in lines if isinstance(record, dict)]
    extra = {key for _, record in good for key in record}.difference(columns)
    return RawBatch(
        rows=np.array([number for number, _ in good], dtype=np.int64),
        columns={name: [record.get(name, MISSING) for _, record in good] for name in columns},
        broken=tuple((number, why) for number, why in lines if isinstance(why, str)),
        extra=tuple(sorted(map(_printable, extra)))[:MAX_EXTRA],
    )


def _printable(name: str) -> str:
    """A name from a file, cut to 80 characters, with what UTF-8 cannot hold escaped."""
    return name[:80].encode("utf-8", "backslashreplace").decode()
