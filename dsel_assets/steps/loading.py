"""The examples of a generation: who they are, and as much of their arrays as is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dsel_assets.data import NON_FINITE_GRADIENT, Examples, merge
from dsel_assets.resources.store import Entry
from dsel_assets.steps.generation import Generation, members
from dsel_assets.steps.pool import TEXT, evaluation_set, load_examples, load_rows, map_inputs
from dsel_assets.steps.sketched import (
    Sketched,
    find_sketched,
    load_sketched,
    map_sketches,
    refuse_other_space,
    rows_of,
)
from dsel_assets.steps.workspace import Workspace

Ints = NDArray[np.int64]
PLACES = ("member", "pool_row", "sketch_row")


@dataclass(frozen=True)
class Rows:
    """Who is in a generation's pool.

    examples    without inputs and sketches, by id: as strategies read them
    duplicates, conflicts
                what came again across arrivals, with the same content and with another; of an id
                that arrives twice the first arrival's row is kept
    member      [N] int64, the place in the generation of the arrival that each came with
    pool_row, sketch_row
                [N] int64, its row in that arrival's inputs and sketches
    """

    examples: Examples
    duplicates: pa.Table
    conflicts: pa.Table
    member: Ints
    pool_row: Ints
    sketch_row: Ints


def pool_rows(ws: Workspace, generation: Generation) -> Rows:
    """Who is in the pool; no array is read."""
    return _pool_rows(_Key(ws, generation))


def load_pool(
    ws: Workspace,
    generation: Generation,
    rows: Ints | None = None,
    arrays: Collection[str] = ("inputs", "sketches"),
) -> Examples:
    """The pool with these arrays; rows: only those at these places in `pool_rows`, so ordered."""
    key = _Key(ws, generation)
    examples = _pool_rows(key).examples
    examples = examples if rows is None else examples.take(rows)
    found = {
        name: _whole(key, name) if rows is None else _gathered(key, name, rows) for name in arrays
    }
    return replace(examples, inputs=found.get("inputs"), sketches=found.get("sketches"))


def texts_of(ws: Workspace, generation: Generation, rows: Ints, name: str) -> list[str]:
    """A column of texts at these places in `pool_rows`; nothing else holds them in memory."""
    known, found = pool_rows(ws, generation), dict[int, str]()
    for number, (pool, _, _) in enumerate(members(ws, generation)):
        at = rows[known.member[rows] == number]
        if len(at):
            column = pq.read_table(pool.file("rows.parquet"), columns=[f"{TEXT}{name}"])[0]
            texts = column.take(pa.array(known.pool_row[at])).to_pylist()
            found |= dict(zip(at.tolist(), texts, strict=True))
    return [found[row] for row in rows.tolist()]


def named_rows(ws: Workspace, generation: Generation, ids: Iterable[str]) -> Ints:
    """Places in `pool_rows` of these ids, in their order; KeyError for one that is not there."""
    wanted = np.array(list(ids), np.str_)
    place, there = _places(pool_rows(ws, generation).examples.ids, wanted)
    if not there.all():
        raise KeyError(str(wanted[~there][0]))
    return place


def arrivals_of(ws: Workspace, generation: Generation, ids: Iterable[str]) -> list[str]:
    """The arrival that each of these ids came with first."""
    member = pool_rows(ws, generation).member[named_rows(ws, generation, ids)]
    return [generation.members[i].arrival for i in member]


def load_target(ws: Workspace) -> Examples | None:
    """The target set with its sketches, or None where the task has none."""
    if ws.task.target is None:
        return None
    target = evaluation_set(ws, "target")
    return load_sketched(ws, _sketched(ws, target).sketches, target)


def training_target(ws: Workspace) -> Examples:
    """The target set as finetuning reads it: without rows that would spoil a model.

    Their gradient is not finite; one that is zero does no harm.
    """
    entry = evaluation_set(ws, "target")
    examples = load_examples(entry)
    refused = pq.read_table(_sketched(ws, entry).gradients.file("quarantine.parquet")).to_pylist()
    spoilt = [row["example_id"] for row in refused if row["reason"] == NON_FINITE_GRADIENT]
    return examples.take(~np.isin(examples.ids, np.array(spoilt, np.str_)))


def _sketched(ws: Workspace, examples: Entry) -> Sketched:
    if found := find_sketched(ws, examples):
        return found
    from dsel_assets.steps.sketches import sketch  # loads torch

    return sketch(ws, examples)


def rows_there(ws: Workspace, generation: Generation, ids: Iterable[str]) -> Ints:
    """Places in `pool_rows` of those of these ids that are there."""
    place, there = _places(pool_rows(ws, generation).examples.ids, np.array(list(ids), np.str_))
    return place[there]


def _places(known: NDArray[np.str_], ids: NDArray[np.str_]) -> tuple[Ints, NDArray[np.bool_]]:
    """Where ids stand among the known, which are sorted, and whether they do."""
    if len(known) == 0:
        return np.zeros(len(ids), np.int64), np.zeros(len(ids), bool)
    place = np.minimum(np.searchsorted(known, ids), len(known) - 1).astype(np.int64)
    return place, known[place] == ids


@dataclass(frozen=True)
class _Key:
    ws: Workspace
    generation: Generation

    @property
    def names(self) -> tuple[object, ...]:
        return self.ws.home, self.ws.task.name, self.generation.identity

    def __hash__(self) -> int:
        return hash(self.names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.names == other.names


@lru_cache(maxsize=1)
def _pool_rows(key: _Key) -> Rows:
    parts = []
    known = zip(key.generation.members, members(key.ws, key.generation), strict=True)
    for number, (member, (pool, _, sketches)) in enumerate(known):
        refuse_other_space(key.ws, sketches, pool)
        examples = load_rows(pool)
        own = rows_of(sketches, examples.ids)
        places = np.full(len(own), number), own, np.arange(len(own))
        found = examples.take(own)
        columns = found.columns | dict(zip(PLACES, places, strict=True))
        parts.append((member.arrival, replace(found, columns=columns)))
    merged, duplicates, conflicts = merge(parts)
    columns = dict(merged.columns)
    order = np.argsort(merged.ids, kind="stable")
    where = [columns.pop(name)[order] for name in PLACES]
    examples = replace(merged, columns=columns).take(order)
    return Rows(examples, duplicates, conflicts, *where)


@lru_cache(maxsize=2)
def _whole(key: _Key, name: str) -> NDArray[np.float32]:
    return _gathered(key, name, np.arange(len(_pool_rows(key).member)))


def _gathered(key: _Key, name: str, rows: Ints) -> NDArray[np.float32]:
    """Inputs or sketches of these rows of the pool, arrival by arrival from their files."""
    known = _pool_rows(key)
    member = known.member[rows]
    place = (known.pool_row if name == "inputs" else known.sketch_row)[rows]
    found: NDArray[np.float32] | None = None
    for number, (pool, _, sketches) in enumerate(members(key.ws, key.generation)):
        at = np.flatnonzero(member == number)
        if len(at) or found is None:
            lie = map_inputs(pool) if name == "inputs" else map_sketches(key.ws, sketches)
            found = np.empty((len(rows), *lie.shape[1:]), np.float32) if found is None else found
            whole = np.array_equal(place[at], np.arange(len(lie)))
            found[at] = lie if whole else lie[place[at]]
    assert found is not None
    return found
