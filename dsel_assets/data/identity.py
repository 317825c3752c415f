"""Who is who: ids from content, so that what arrives twice counts once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dsel_assets.data.examples import Examples
from dsel_assets.data.quarantine import CONFLICTING_ID, quarantine_table, table_of

DIGEST_COLUMN = "content_digest"
ROW_COLUMN = "row"
DUPLICATES_SCHEMA = pa.schema(
    [("example_id", pa.string()), ("arrival", pa.string()), ("first_arrival", pa.string())]
)


def example_ids(inputs: NDArray[Any], labels: Iterable[str]) -> NDArray[np.str_]:
    """[N] ids of 32 hex digits: 16 bytes of BLAKE2b over the label's name and the input's content.

    inputs  [N, ...] numbers; what counts is their float32 value, so that float32 and float64, or
            -0 and 0, are the same content. Pixels are scaled already (see `data.cells`)
    labels  N names of classes (names and not indices: a new class in the list renumbers nobody)

    A row's id depends on nothing but the row: not on its neighbours, the order, or the file format.
    """
    digests = []
    for row, label in zip(inputs, labels, strict=True):
        name = label.encode("utf-8")
        digest = hashlib.blake2b(len(name).to_bytes(8, "little") + name, digest_size=16)
        digest.update((np.asarray(row, dtype="<f4") + np.float32(0)).tobytes())
        digests.append(digest.hexdigest())
    return np.array(digests, dtype=np.str_)


def first_of(keys: NDArray[np.str_]) -> NDArray[np.int64]:
    """[N] for each key the position of its first occurrence (its own, if it is new)."""
    codes = pa.array(keys.tolist(), pa.string()).dictionary_encode().indices.to_numpy()
    first = np.empty(len(codes), np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # of equal indices the last one written holds
    return first[codes]


def merge(parts: Sequence[tuple[str, Examples]]) -> tuple[Examples, pa.Table, pa.Table]:
    """One pool out of validated arrivals; of an id that arrives twice, the first arrival's is kept.

    parts  (arrival, its examples), sorted by arrival, each with the column `content_digest`

    Returns the examples in the order of arrival, then row; a table (example_id, arrival,
    first_arrival) of the same content delivered again; and a quarantine table of the ids that came
    again with other content. Raises ValueError where the parts do not have the same columns.
    """
    arrivals = [arrival for arrival, _ in parts]
    merged = concatenate(parts)
    source = np.repeat(np.arange(len(parts)), [len(examples) for _, examples in parts])
    first = first_of(merged.ids)
    again = np.flatnonzero(first != np.arange(len(merged)))
    digests = merged.columns[DIGEST_COLUMN]
    duplicates, conflicts = [], []
    for i in again:
        example_id, owner = str(merged.ids[i]), arrivals[source[first[i]]]
        if digests[i] == digests[first[i]]:
            duplicates.append((example_id, arrivals[source[i]], owner))
        else:
            detail = f"arrival {owner} has other content under this id"
            conflicts.append((arrivals[source[i]], None, example_id, CONFLICTING_ID, detail))
    kept = merged.take(first == np.arange(len(merged))) if len(again) else merged
    return kept, table_of(duplicates, DUPLICATES_SCHEMA), quarantine_table(conflicts)


def concatenate(parts: Sequence[tuple[str, Examples]]) -> Examples:
    """The examples of (source, examples) pairs one after another, ids as they are.

    Raises ValueError naming the source whose columns or shapes differ from the first one's.
    """
    if not parts:
        text: NDArray[np.str_] = np.array([], dtype=np.str_)
        return Examples(text, np.array([], dtype=np.int64), text, columns={DIGEST_COLUMN: text})
    expected = _layout(parts[0][1])
    for source, examples in parts:
        if (layout := _layout(examples)) != expected or DIGEST_COLUMN not in layout:
            raise ValueError(
                f"{source} has arrays {layout}, {parts[0][0]} has {expected}, and each needs "
                f"{DIGEST_COLUMN!r}; validate both under one contract"
            )
    every = [examples for _, examples in parts]
    arrays = {
        field.name: np.concatenate([getattr(examples, field.name) for examples in every])
        for field in fields(Examples)
        if field.name != "columns" and getattr(every[0], field.name) is not None
    }
    columns = {
        name: np.concatenate([examples.columns[name] for examples in every])
        for name in every[0].columns
    }
    return Examples(**arrays, columns=columns)


def _layout(examples: Examples) -> dict[str, tuple[int, ...] | None]:
    """Which arrays there are, and the shape of one row of each."""
    arrays = {"inputs": examples.inputs, "sketches": examples.sketches, **examples.columns}
    return {
        name: None if array is None else array.shape[1:] for name, array in sorted(arrays.items())
    }
